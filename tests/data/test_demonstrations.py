import gzip
import json

import pytest

from irlfast.data import DataError, Demonstration, Message, load_demonstrations, split


def write(path, *rows, encoding="utf-8"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def test_the_three_forms_in_one_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "response": "r", "id": 1}, {"messages": CHAT}, {"text": "t"})
    pair, chat, text = load_demonstrations(path)
    assert (pair.prompt, pair.response, pair.messages, pair.is_text) == ("p", "r", None, False)
    assert chat.messages == tuple(Message(**turn) for turn in CHAT[:-1])
    assert (chat.prompt, chat.response) == ("", "4")
    assert (text.prompt, text.response, text.is_text) == ("", "t", True)
    assert [row.source for row in (pair, chat, text)] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_field_names_and_limit(tmp_path):
    path = write(tmp_path / "rows.jsonl", *({"q": f"q{i}", "a": f"a{i}"} for i in range(5)), "not read")
    rows = load_demonstrations(path, prompt_field="q", response_field="a", limit=5)
    assert [(row.prompt, row.response) for row in rows] == [(f"q{i}", f"a{i}") for i in range(5)]
    text = load_demonstrations(path, prompt_field=None, response_field=None, text_field="a", limit=1)
    assert text == [Demonstration(prompt="", response="a0", is_text=True, source=f"{path}:1")]


def test_gzip_is_told_by_its_content(tmp_path):
    line = json.dumps({"text": "é"}).encode() + b"\n"
    for name in ("a.jsonl.gz", "a.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(line))
        assert load_demonstrations(tmp_path / name)[0].response == "é"


def test_blank_lines_a_byte_order_mark_and_odd_line_breaks(tmp_path):
    path = tmp_path / "rows.jsonl"
    # U+2028 and U+0085 break lines for str.splitlines and may stand in a JSON string.
    path.write_bytes("\ufeff\n  \n".encode() + '{"text": "a\u2028b\u0085c"}\r\n\n{"text": "d"}'.encode())
    rows = load_demonstrations(path)
    assert [row.response for row in rows] == ["a\u2028b\u0085c", "d"]
    assert [row.source for row in rows] == [f"{path}:3", f"{path}:5"]


GOOD = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "p", ', "not a JSON object on one line"),
        ("[1, 2]", "expected an object, got list"),
        ("[" * 100_000, "not a JSON object on one line"),
        ({"prompt": "p"}, "field 'response' is missing beside 'prompt'; fields found: \\['prompt'\\]"),
        ({"response": "r"}, "field 'prompt' is missing beside 'response'"),
        ({"prompt": "p", "response": None}, "field 'response' is missing"),
        (
            {"title": "x"},
            "field 'prompt' and 'response' or 'messages' or 'text' is missing; fields found: \\['title'\\]",
        ),
        ({"prompt": 3, "response": "r"}, "field 'prompt' must be a string, got int 3"),
        ({"prompt": "p", "response": ["r"]}, "field 'response' must be a string, got list \\['r'\\]"),
        ({"text": {"a": 1}}, "field 'text' must be a string, got dict"),
        (
            {**GOOD, "text": "t"},
            "could be read as prompt/response and text; set the field names you do not mean to None",
        ),
        ({**GOOD, "messages": CHAT}, "could be read as prompt/response and messages"),
        ({"messages": "hello"}, "field 'messages' must be a list of at least two turns, got str 'hello'"),
        ({"messages": CHAT[-1:]}, "field 'messages' must be a list of at least two turns"),
        ({"messages": CHAT[:-1]}, "must end with the assistant's turn, which is the response; turn 3 is by 'user'"),
        ({"messages": [*CHAT[:1], {"role": "assistant"}]}, "field 'messages', turn 1 must be"),
        ({"messages": ["hi", *CHAT[-1:]]}, "field 'messages', turn 0 must be"),
        ({"messages": [{"role": "user", "content": [{}]}, *CHAT[-1:]]}, "field 'messages', turn 0 must be"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", GOOD, "", row)
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{message}"):
        load_demonstrations(path)


def test_an_ambiguous_row_is_read_when_told_how(tmp_path):
    path = write(tmp_path / "rows.jsonl", {**GOOD, "text": "t", "messages": CHAT})
    assert load_demonstrations(path, text_field=None, messages_field=None)[0].response == "r"
    assert load_demonstrations(path, text_field=None, prompt_field=None, response_field=None)[0].response == "4"


def test_text_that_is_not_utf8_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: byte 10 is not UTF-8 .*: convert the file to UTF-8"):
        load_demonstrations(path)


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_a_damaged_gzip_file_is_named(tmp_path, fault):
    content = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(2000))))
    if fault == "cut":
        del content[-200:]
    else:
        content[len(content) // 2] ^= 0xFF
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: "):
        load_demonstrations(path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl has no rows"):
        load_demonstrations(path)


@pytest.mark.parametrize("source", ["missing.jsonl", "missing.jsonl.gz", "./missing", "/nowhere/rows", "a/b/c"])
def test_a_missing_file_is_not_taken_for_a_dataset(source):
    with pytest.raises(FileNotFoundError, match=f"{source} does not exist"):
        load_demonstrations(source)


def test_argument_errors(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_demonstrations(path, limit=0)
    with pytest.raises(ValueError, match="give both or neither of prompt_field"):
        load_demonstrations(path, prompt_field=None)


class TestDatasets:
    """Datasets as the `datasets` package stores them; nothing is fetched."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
        self.datasets = datasets
        self.rows = datasets.Dataset.from_list([{"prompt": f"p{i}", "response": f"r{i}"} for i in range(4)])

    def test_a_saved_dataset(self, tmp_path):
        self.rows.save_to_disk(tmp_path / "saved")
        rows = load_demonstrations(tmp_path / "saved", limit=3)
        assert [(row.prompt, row.response) for row in rows] == [("p0", "r0"), ("p1", "r1"), ("p2", "r2")]
        assert rows[2].source == f"{tmp_path / 'saved'}[train][2]"

    def test_a_saved_dataset_with_splits(self, tmp_path):
        self.datasets.DatasetDict({"test": self.rows}).save_to_disk(tmp_path / "saved")
        assert len(load_demonstrations(str(tmp_path / "saved"), split="test")) == 4
        with pytest.raises(DataError, match=r"has no split 'train', only \['test'\]"):
            load_demonstrations(tmp_path / "saved")

    def test_a_parquet_file(self, tmp_path):
        self.rows.to_parquet(tmp_path / "rows.parquet")
        assert [row.response for row in load_demonstrations(tmp_path / "rows.parquet")] == ["r0", "r1", "r2", "r3"]

    def test_a_folder_of_data_files(self, tmp_path):
        (tmp_path / "folder").mkdir()
        self.rows.to_parquet(tmp_path / "folder" / "test.parquet")
        assert len(load_demonstrations(tmp_path / "folder", split="test")) == 4

    def test_columns_that_are_none_do_not_count(self, tmp_path):
        self.datasets.Dataset.from_list(
            [{"messages": CHAT, "text": None}, {"messages": None, "text": "t"}]
        ).save_to_disk(tmp_path / "saved")
        chat, text = load_demonstrations(tmp_path / "saved")
        assert chat.messages == tuple(Message(**turn) for turn in CHAT[:-1])
        assert text.is_text

    def test_a_bad_row_is_named(self, tmp_path):
        self.datasets.Dataset.from_list([{"title": "x"}]).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match=r"saved\[train\]\[0\]: field 'prompt' and 'response' or"):
            load_demonstrations(tmp_path / "saved")


def pairs(*prompts: str) -> list[Demonstration]:
    return [Demonstration(prompt=prompt, response=str(i)) for i, prompt in enumerate(prompts)]


def test_split_keeps_every_row_and_parts_the_prompts():
    rows = pairs(*(f"p{i % 37}" for i in range(100)))
    train, heldout = split(rows, heldout_fraction=0.2, seed=3)
    assert sorted(int(row.response) for row in train + heldout) == list(range(100))
    assert not {row.prompt for row in train} & {row.prompt for row in heldout}
    assert 18 <= len(heldout) <= 20


def test_split_is_shuffled_by_its_seed():
    rows = pairs(*map(str, range(50)))
    first, again, other = (split(rows, heldout_count=10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first[1]) == 10
    assert [row.prompt for row in first[0]] != sorted((row.prompt for row in first[0]), key=int)
    # Whoever asks for the split of seed 0 tomorrow must get today's.
    assert [row.prompt for row in first[1]] == ["27", "7", "12", "47", "43", "1", "0", "14", "28", "36"]


def test_rows_of_one_prompt_do_not_stand_together_after_a_split():
    rows = pairs(*(p for p in "abcdefgh" for _ in range(20)))
    train, _ = split(rows, heldout_count=20, seed=0)
    assert len({row.prompt for row in train[:20]}) > 3


def test_texts_and_chats_are_parted_too_and_white_space_does_not_matter():
    chat = tuple(Message(**turn) for turn in CHAT[:-1])
    spaced = (*chat[:-1], Message(role="user", content=" 2 +  2?\n"))
    rows = [
        *(Demonstration(prompt="", response=f"a  story {i}", is_text=True) for i in range(6)),
        *(Demonstration(prompt="", response=f" a story {i}\n", is_text=True) for i in range(6)),
        Demonstration(prompt="", response="4", messages=chat),
        Demonstration(prompt="", response="four", messages=spaced),
        Demonstration(prompt="", response="4", messages=chat[:2]),
    ]
    assert rows[12].group_key == rows[13].group_key != rows[14].group_key
    for seed in range(10):
        train, heldout = split(rows, heldout_count=5, seed=seed)
        assert not {row.group_key for row in train} & {row.group_key for row in heldout}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("abc", {}, "give one of heldout_fraction = None and heldout_count = None"),
        ("abc", {"heldout_fraction": 0.5, "heldout_count": 1}, "give one of"),
        ("abc", {"heldout_fraction": 1.0}, r"heldout_fraction must be in \(0, 1\), got 1.0"),
        ("abc", {"heldout_fraction": 0.1}, "0 of 3 rows would be held out"),
        ("abc", {"heldout_count": 3}, "3 of 3 rows would be held out"),
        ("aaaa", {"heldout_count": 2}, "4 rows have 1 different prompts, too few to hold out 2 rows"),
    ],
)
def test_split_errors(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        split(pairs(*prompts), seed=0, **options)


def test_real_stories_and_questions(shared_data):
    stories = load_demonstrations(shared_data / "text" / "tinystories_1000.jsonl.gz")
    assert len(stories) == 1000
    assert all(row.is_text and len(row.response) > 50 for row in stories)
    questions = load_demonstrations(
        shared_data / "gsm8k" / "test.jsonl.gz", prompt_field="question", response_field="answer"
    )
    assert len(questions) == 1019
    assert all("\n#### " in row.response for row in questions)
    train, heldout = split(stories, heldout_fraction=0.1, seed=0)
    assert (len(train), len(heldout)) == (900, 100)
