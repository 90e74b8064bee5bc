"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as demonstrations, and the number an answer ends with.

A row {"question", "answer"} becomes {"prompt": "Question: ...\\nAnswer: ", "response": ...}. The answer's last line is
"#### " and the final number; its marks <<48/2=24>>, meant for a calculator, are left out unless they are asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from .demonstrations import DataError, load_demonstrations

HUB_NAME = "openai/gsm8k"
_CALCULATION = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def gsm8k_rows(
    source: str | Path = HUB_NAME, *, split: str = "train", calculations: bool = False, limit: int | None = None
) -> list[dict[str, str]]:
    """Read GSM8K and return prompt/response rows.

    Args:
        source: a JSON-lines file (.gz too) of {"question", "answer"} rows, or the dataset's hub name.
        split: split of the hub's dataset; of no meaning for a file.
        calculations: keep the marks <<...>>.
        limit: read the first so many rows.

    Raises:
        DataError: a row without question or answer, or an answer without a final number; the message names the row.
        FileNotFoundError, ImportError: as `load_demonstrations`.
    """
    found = load_demonstrations(
        source,
        prompt_field="question",
        response_field="answer",
        text_field=None,
        messages_field=None,
        split=split,
        config="main" if str(source) == HUB_NAME else None,
        limit=limit,
    )
    rows = []
    for row in found:
        if "####" not in row.response or final_number(row.response) is None:
            raise DataError(f"{row.source}: the answer has no final number after '####': {row.response[-60:]!r}")
        answer = row.response if calculations else _CALCULATION.sub("", row.response)
        rows.append({"prompt": f"Question: {row.prompt.strip()}\nAnswer: ", "response": answer.strip()})
    return rows


def write_rows(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def final_number(text: str) -> Decimal | None:
    """The number after the last "####", else the last number in the text; thousands separators are understood.

    1,234.50 and 1234.5 are equal. None where there is no number (or none after "####").
    """
    numbers = _NUMBER.findall(text.rpartition("####")[2])
    if not numbers:
        return None
    number = numbers[0] if "####" in text else numbers[-1]
    return Decimal(number.replace(",", "")).normalize()


def exact_match(reference: str, answer: str) -> float:
    """1.0 where both texts end with the same number, else 0.0; a reference without one is a DataError."""
    wanted = final_number(reference)
    if wanted is None:
        raise DataError(f"the reference has no final number: {reference[-60:]!r}")
    return float(final_number(answer) == wanted)
