import logging

import pytest

from irlfast.data import (
    DataError,
    Demonstration,
    Message,
    TokenizedDemonstration,
    load_demonstrations,
    tokenize_demonstrations,
)

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(*, bos: bool = False, eos_behind: bool = False, merges: tuple[tuple[str, str], ...] = ()):
    """A tokenizer with one token for each character, and for each pair in `merges`, in their order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"])
    if bos or eos_behind:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if eos_behind else ''}",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def pair(prompt: str, response: str) -> Demonstration:
    return Demonstration(prompt=prompt, response=response, source="rows.jsonl:1")


def text(content: str) -> Demonstration:
    return Demonstration(prompt="", response=content, is_text=True, source="rows.jsonl:1")


def one(row: Demonstration, tokenizer, **options) -> TokenizedDemonstration:
    rows = tokenize_demonstrations([row], tokenizer, **{"max_response_tokens": 50, **options})
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos_behind", [False, True])
def test_special_tokens_stand_in_front_of_the_prompt_and_nowhere_else(bos, eos_behind):
    tokenizer = byte_tokenizer(bos=bos, eos_behind=eos_behind)
    row = one(pair("ab", "cd"), tokenizer)
    assert tokenizer.decode(row.prompt_ids) == ("<s>" if bos else "") + "ab"
    assert tokenizer.decode(row.response_ids) == "cd</s>"
    assert not row.truncated
    row = one(text("abcdef"), tokenizer, prompt_tokens=3)
    assert tokenizer.decode(row.prompt_ids) == ("<s>ab" if bos else "abc")
    assert tokenizer.decode(row.response_ids) == ("cdef" if bos else "def") + "</s>"


@pytest.mark.parametrize(
    ("limit", "expected", "truncated"),
    [
        (6, "abcd</s>", False),
        (5, "abcd</s>", False),  # the EOS just fits
        (4, "abcd", True),  # a sampler with 4 tokens would not have come to its EOS either
        (3, "abc", True),
        (1, "a", True),
    ],
)
def test_eos_ends_a_whole_response_and_not_a_cut_one(limit, expected, truncated):
    tokenizer = byte_tokenizer()
    for row, options in ((pair("x", "abcd"), {}), (text("xabcd"), {"prompt_tokens": 1})):
        found = one(row, tokenizer, max_response_tokens=limit, **options)
        assert tokenizer.decode(found.response_ids) == expected
        assert found.truncated == truncated
        assert len(found.response_ids) <= limit


def test_without_add_eos_nothing_is_added():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(one(pair("x", "abcd"), tokenizer, add_eos=False).response_ids) == "abcd"
    full = one(pair("x", "abcd"), tokenizer, add_eos=False, max_response_tokens=4)
    assert (tokenizer.decode(full.response_ids), full.truncated) == ("abcd", False)
    tokenizer.eos_token = None
    assert tokenizer.decode(one(pair("x", "abcd"), tokenizer, add_eos=False).response_ids) == "abcd"
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        one(pair("x", "abcd"), tokenizer)


def test_an_eos_spelt_in_the_response_ends_it_once():
    tokenizer = byte_tokenizer()
    for response in ("ab</s>", "ab</s>cd", "ab"):
        assert tokenizer.decode(one(pair("x", response), tokenizer).response_ids) == "ab</s>"


def test_the_response_has_the_tokens_of_the_joint_text_where_the_prompt_keeps_its_own():
    tokenizer = byte_tokenizer(merges=(("c", "d"),))
    row = one(pair("ab", "cd"), tokenizer)
    assert [*row.prompt_ids, *row.response_ids[:-1]] == tokenizer("abcd")["input_ids"]
    assert len(row.response_ids) == 2


def test_a_merge_across_the_boundary_is_not_made():
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    row = one(pair("ab", "cd"), tokenizer)
    assert len(tokenizer("abcd")["input_ids"]) == 3
    assert list(row.prompt_ids) == tokenizer("ab")["input_ids"]  # what a sampler is given
    assert tokenizer.decode([*row.prompt_ids, *row.response_ids]) == "abcd</s>"
    assert len(row.response_ids) == 3


def test_rows_that_cannot_be_used_are_dropped_counted_and_logged(caplog):
    rows = [
        pair("ab", ""),
        pair("ab", "</s>cd"),
        pair("abcdef", "x"),
        pair("ab", "x"),
        text("abc"),
        text("abcd"),
    ]
    with caplog.at_level(logging.WARNING):
        kept = tokenize_demonstrations(
            rows, byte_tokenizer(), max_response_tokens=5, max_prompt_tokens=4, prompt_tokens=3
        )
    assert kept.dropped == {"empty response": 2, "long prompt": 1, "short text": 1}
    assert len(kept) == 2
    assert isinstance(kept, list)
    assert "dropped 4 of 6 demonstrations: 2 with empty response, 1 with long prompt, 1 with short text" in caplog.text


def test_nothing_is_logged_when_nothing_is_dropped(caplog):
    with caplog.at_level(logging.DEBUG, logger="irlfast"):
        assert tokenize_demonstrations([pair("a", "b")], byte_tokenizer(), max_response_tokens=5).dropped == {}
    assert caplog.text == ""


def test_no_usable_row_is_an_error():
    with pytest.raises(DataError, match="none of 2 demonstrations can be used: 2 with empty response"):
        tokenize_demonstrations([pair("a", ""), pair("b", "")], byte_tokenizer(), max_response_tokens=5)


def test_an_empty_prompt_is_bos_alone_or_an_error():
    tokenizer = byte_tokenizer(bos=True, eos_behind=True)
    assert one(pair("", "ab"), tokenizer).prompt_ids == (tokenizer.bos_token_id,)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt has no tokens and the tokenizer adds no BOS"):
        one(pair("", "ab"), byte_tokenizer())


def chat(*turns: tuple[str, str], response: str = "4") -> Demonstration:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Demonstration(prompt="", response=response, messages=messages, source="rows.jsonl:7")


@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_goes_through_the_template_which_brings_its_own_special_tokens(bos):
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATE
    row = one(chat(("user", "2 + 2?")), tokenizer)
    assert tokenizer.decode(row.prompt_ids) == "<|user|>2 + 2?<|end|><|assistant|>"
    assert tokenizer.decode(row.response_ids) == "4</s>"
    turns = [{"role": "user", "content": "2 + 2?"}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(row.prompt_ids) == rendered


def test_a_chat_without_a_template_or_refused_by_it_is_an_error():
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match=r"rows\.jsonl:7: a chat needs a tokenizer with a chat template"):
        one(chat(("user", "2 + 2?")), tokenizer)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the tokenizer's chat template refuses.*no system turns"):
        one(chat(("system", "Be brief."), ("user", "2 + 2?")), tokenizer)


@pytest.mark.parametrize("option", ["max_response_tokens", "max_prompt_tokens", "prompt_tokens"])
def test_limits_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        tokenize_demonstrations([pair("a", "b")], byte_tokenizer(), **{"max_response_tokens": 5, option: 0})


@pytest.fixture(scope="module")
def stories_tokenizer(shared_data):
    return transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")


def test_real_stories(shared_data, stories_tokenizer):
    rows = load_demonstrations(shared_data / "text" / "tinystories_1000.jsonl.gz", limit=200)
    kept = tokenize_demonstrations(rows, stories_tokenizer, max_response_tokens=64)
    assert len(kept) == 200
    assert kept.dropped == {}
    for row, tokenized in zip(rows, kept, strict=True):
        whole = stories_tokenizer(row.response)["input_ids"]
        assert [*tokenized.prompt_ids, *tokenized.response_ids] == whole[:96]
        assert len(tokenized.prompt_ids) == 32
        assert tokenized.prompt_ids[0] == stories_tokenizer.bos_token_id
        assert tokenized.truncated == (stories_tokenizer.eos_token_id not in tokenized.response_ids)
    whole = tokenize_demonstrations(rows, stories_tokenizer, max_response_tokens=5000)
    assert {row.response_ids.count(1) for row in whole} == {1}
    assert {row.response_ids[-1] for row in whole} == {1}


@pytest.mark.parametrize("join", [" ", ""])
def test_a_real_story_cut_between_words_is_put_together_without_a_second_space(stories_tokenizer, join):
    # The tokenizer drops a space at the end of the prompt and adds one in front of the response.
    prompt, response = "Once upon a time," + join, ("" if join else " ") + "there was a boy."
    row = one(pair(prompt, response), stories_tokenizer)
    whole = stories_tokenizer("Once upon a time, there was a boy.")["input_ids"]
    assert [*row.prompt_ids, *row.response_ids] == [*whole, 1]
    assert list(row.prompt_ids) == stories_tokenizer(prompt)["input_ids"]


def test_real_questions_and_answers(shared_data, stories_tokenizer):
    rows = load_demonstrations(
        shared_data / "gsm8k" / "test.jsonl.gz", prompt_field="question", response_field="answer", limit=100
    )
    kept = tokenize_demonstrations(rows, stories_tokenizer, max_response_tokens=10**6)
    assert len(kept) == 100
    for row, tokenized in zip(rows, kept, strict=True):
        assert list(tokenized.prompt_ids) == stories_tokenizer(row.prompt)["input_ids"]
        assert tokenized.response_ids[-1] == 1
        number = row.response.rsplit("#### ", 1)[1]
        assert stories_tokenizer.decode(tokenized.response_ids[:-1]).endswith(f"#### {number}")
