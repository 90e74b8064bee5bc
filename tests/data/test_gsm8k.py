"""GSM8K rows and final numbers."""

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from irlfast.data import DataError, load_demonstrations
from irlfast.data.gsm8k import exact_match, final_number, gsm8k_rows, write_rows

ROW = {"question": " How many? ", "answer": "He has 2*1,000 = <<2*1000=2000>>2,000 clips.\n#### 2,000"}


def file_of(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "gsm8k.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_a_row_becomes_prompt_and_response(tmp_path: Path) -> None:
    path = file_of(tmp_path, ROW)
    (row,) = gsm8k_rows(path)
    assert row == {
        "prompt": "Question: How many?\nAnswer: ",
        "response": "He has 2*1,000 = 2,000 clips.\n#### 2,000",
    }
    assert "<<2*1000=2000>>" in gsm8k_rows(path, calculations=True)[0]["response"]
    write_rows([row, row], tmp_path / "made" / "rows.jsonl")
    read = load_demonstrations(tmp_path / "made" / "rows.jsonl")
    assert [(r.prompt, r.response) for r in read] == [(row["prompt"], row["response"])] * 2


def test_a_row_without_a_final_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"gsm8k\.jsonl\.gz:2: the answer has no final number after '####': 'Nobody knows\.'"
    ):
        gsm8k_rows(file_of(tmp_path, ROW, {"question": "?", "answer": "Nobody knows."}))
    with pytest.raises(DataError, match=r"gsm8k\.jsonl\.gz:1: field 'answer' is missing beside 'question'"):
        gsm8k_rows(file_of(tmp_path, {"question": "?"}))


def test_the_hubs_dataset_is_read_in_its_main_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*names: Any, split: str) -> list[dict[str, str]]:
        asked.append((names, split))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(gsm8k_rows(split="test")) == 1
    assert asked == [(("openai/gsm8k", "main"), "test")]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("5 then 6\n#### -1,234.50\n", "-1234.5"),
        ("#### $12", "12"),
        ("first 3, so the answer is 18.", "18"),
        ("#### 3 of 4", "3"),
        (".5", "0.5"),
        ("none", None),
        ("7 #### none", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_is_of_numbers() -> None:
    assert exact_match("#### 1000", "so 1,000.0") == 1.0
    assert exact_match("#### 1000", "#### 1001") == 0.0
    assert exact_match("#### 1000", "I do not know") == 0.0
    with pytest.raises(DataError, match="no final number"):
        exact_match("none", "1")


def test_the_real_files_are_read(shared_data: Path) -> None:
    folder = shared_data / "gsm8k"
    training, test = (gsm8k_rows(folder / f"{name}.jsonl.gz") for name in ("train", "test"))
    assert (len(training), len(test)) == (7473, 1019)
    assert not any("<<" in row["response"] for row in training)
    with gzip.open(folder / "model_solutions.jsonl.gz", "rt", encoding="utf-8") as lines:
        solutions = [json.loads(line) for line in lines]
    graded = [
        (exact_match(answer["response"], row[model]["solution"]), row[model]["is_correct"])
        for row, answer in zip(solutions, test, strict=True)
        for model in ("6b_finetuning", "175b_verification")
    ]
    # Their own graders' marks: the final number decides nearly all of them.
    assert sum(ours == theirs for ours, theirs in graded) / len(graded) > 0.99
