"""Read demonstrations, and split them into rows to train on and rows held out.

A row has one of three forms:

    {"prompt": ..., "response": ...}                       a pair
    {"messages": [{"role": ..., "content": ...}, ...]}     a chat; the last turn, the assistant's, is the response
    {"text": ...}                                          plain text; tokenisation cuts the prompt off its front

Other fields are ignored. A row that could be read in two of these ways is refused rather than guessed at.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".parquet")


class DataError(ValueError):
    """Data that cannot be used; the message says where it is, what is wrong with it and what to do."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What somebody wrote in answer to a prompt.

    Args:
        prompt: what was asked; "" for a chat or plain text.
        response: the answer; for plain text all of it.
        messages: for a chat the turns before the response, else None.
        is_text: plain text, whose prompt is its first tokens.
        source: where it was read, "file:line" (from 1) or "dataset[split][row]" (from 0).
    """

    prompt: str
    response: str
    messages: tuple[Message, ...] | None = None
    is_text: bool = False
    source: str = ""

    @property
    def group_key(self) -> Hashable:
        """Equal for rows with the same prompt (or the same text), up to white space."""
        if self.messages is not None:
            return "messages", tuple((turn.role, " ".join(turn.content.split())) for turn in self.messages)
        return ("text", " ".join(self.response.split())) if self.is_text else ("pair", " ".join(self.prompt.split()))


def load_demonstrations(
    source: str | Path,
    *,
    prompt_field: str | None = "prompt",
    response_field: str | None = "response",
    text_field: str | None = "text",
    messages_field: str | None = "messages",
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
) -> list[Demonstration]:
    """Read demonstrations from a file or a Hugging Face dataset.

    Args:
        source: a file of JSON lines (also gzipped) or Parquet, a folder written by `Dataset.save_to_disk` or holding
            data files, or the name of a dataset. Blank lines are skipped.
        prompt_field, response_field, text_field, messages_field: names of the fields; None leaves that form out.
        split: which split of a dataset to read; of no meaning for a file.
        config: which configuration of a hub dataset to read, where it has several.
        limit: read the first so many rows; None is all.

    Returns:
        At least one demonstration, in the order of the source.

    Raises:
        DataError: a row that cannot be used (naming file, line and field), or no row at all.
        FileNotFoundError: a path that does not exist.
        ImportError: a dataset without the `datasets` package.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for every row, got {limit}")
    if (prompt_field is None) != (response_field is None):
        raise ValueError(
            f"give both or neither of prompt_field = {prompt_field!r} and response_field = {response_field!r}"
        )
    form = _Form(prompt_field, response_field, text_field, messages_field)
    path = Path(source)
    if path.is_file() and path.suffix != ".parquet":
        located: Iterable[tuple[str, Any]] = json_lines(path)
    elif path.exists() or not _looks_like_a_path(str(source)):
        located = _dataset_rows(source, split, config)
    else:
        raise FileNotFoundError(f"{source} does not exist (a dataset's name has the form owner/name)")
    rows = [form.read(row, where) for where, row in islice(located, limit)]
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def split_demonstrations(
    rows: Sequence[Demonstration],
    *,
    heldout_fraction: float | None = None,
    heldout_count: int | None = None,
    seed: int,
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Shuffle rows and put some aside. Rows with the same prompt (or the same text) are never on both sides.

    Args:
        rows: demonstrations.
        heldout_fraction: share of the rows to hold out, in (0, 1); or
        heldout_count: how many. Rows of one prompt stay together, so a few less may be held out, never more.
        seed: the same rows and seed give the same split.

    Returns:
        (train, heldout), both in shuffled order and not empty.

    Raises:
        ValueError: neither or both of fraction and count, or a split with an empty side.
    """
    if (heldout_fraction is None) == (heldout_count is None):
        raise ValueError(f"give one of heldout_fraction = {heldout_fraction} and heldout_count = {heldout_count}")
    if heldout_fraction is not None:
        if not 0.0 < heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction must be in (0, 1), got {heldout_fraction}")
        wanted = round(heldout_fraction * len(rows))
    else:
        assert heldout_count is not None
        wanted = heldout_count
    if not 0 < wanted < len(rows):
        raise ValueError(f"{wanted} of {len(rows)} rows would be held out: both sides need at least one row")
    groups: dict[Hashable, list[Demonstration]] = {}
    for row in rows:
        groups.setdefault(row.group_key, []).append(row)
    shuffle = random.Random(seed).shuffle
    order = list(groups.values())
    shuffle(order)
    train: list[Demonstration] = []
    heldout: list[Demonstration] = []
    for group in order:
        (heldout if len(heldout) + len(group) <= wanted else train).extend(group)
    if not heldout or not train:
        raise ValueError(
            f"{len(rows)} rows have {len(groups)} different prompts, too few to hold out {wanted} rows of prompts that "
            "are not trained on: give more prompts or another heldout size"
        )
    # Rows of one prompt would otherwise stand together.
    shuffle(train)
    shuffle(heldout)
    return train, heldout


@dataclass(frozen=True)
class _Form:
    """The names of the fields, and how a row is read by them."""

    prompt: str | None
    response: str | None
    text: str | None
    messages: str | None

    def read(self, row: Any, where: str) -> Demonstration:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        # A dataset's columns are there in every row; those that do not apply are None.
        present = {name for name, value in row.items() if value is not None}
        whole = [
            names
            for names in ((self.prompt, self.response), (self.messages,), (self.text,))
            if None not in names and present.issuperset(names)
        ]
        if len(whole) > 1:
            found = " and ".join("/".join(str(name) for name in names) for names in whole)
            raise DataError(f"{where}: could be read as {found}; set the field names you do not mean to None")
        if not whole:
            raise DataError(f"{where}: {self._what_is_missing(present)}; fields found: {sorted(present)}")
        if whole[0] == (self.messages,):
            messages, response = self._chat(row[self.messages], where)
            return Demonstration(prompt="", response=response, messages=messages, source=where)
        if whole[0] == (self.text,):
            return Demonstration(prompt="", response=required_string(row, self.text, where), is_text=True, source=where)
        prompt, response = required_string(row, self.prompt, where), required_string(row, self.response, where)
        return Demonstration(prompt=prompt, response=response, source=where)

    def _what_is_missing(self, present: set[str]) -> str:
        for here, other in ((self.prompt, self.response), (self.response, self.prompt)):
            if here in present:
                return f"field {other!r} is missing beside {here!r}"
        forms = [f"{self.prompt!r} and {self.response!r}"] if self.prompt is not None else []
        forms += [repr(name) for name in (self.messages, self.text) if name is not None]
        return f"field {' or '.join(forms)} is missing"

    def _chat(self, turns: Any, where: str) -> tuple[tuple[Message, ...], str]:
        field = self.messages
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(f"{where}: field {field!r} must be a list of at least two turns, got {_shown(turns)}")
        *messages, last = chat_turns(turns, field, where)
        if last.role != "assistant":
            raise DataError(
                f"{where}: field {field!r} must end with the assistant's turn, which is the response; "
                f"turn {len(turns) - 1} is by {last.role!r}"
            )
        return tuple(messages), last.content


def chat_turns(turns: Sequence[Any], field: str | None, where: str) -> tuple[Message, ...]:
    """The turns of a chat in a field. DataError: one is no {"role": ..., "content": ...} with strings."""
    for i, turn in enumerate(turns):
        for key in ("role", "content"):
            if not isinstance(turn, Mapping) or not isinstance(turn.get(key), str):
                raise DataError(
                    f'{where}: field {field!r}, turn {i} must be {{"role": ..., "content": ...}} with strings, '
                    f"got {_shown(turn)}"
                )
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in turns)


def required_string(row: Mapping[str, Any], field: str | None, where: str) -> str:
    """The text in a field. DataError: there is no such field, or it holds something else."""
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing; fields found: {sorted(row)}")
    value = row[str(field)]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be a string, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.endswith(_FILE_SUFFIXES) or source.count("/") > 1


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line of a file of JSON lines, gzipped or not, that is not blank."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    number = 0
    # Lines are read as bytes: a text file would also break them at characters that JSON allows inside a string.
    with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
        iterator = iter(lines)
        while True:
            where = f"{path}:{number + 1}"
            try:
                line = next(iterator)
            except StopIteration:
                return
            except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
                raise DataError(
                    f"{where}: the gzip stream is damaged or cut off ({cause}): fetch the file again"
                ) from cause
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as cause:
                raise DataError(
                    f"{where}: byte {cause.start} is not UTF-8 ({cause.reason}): convert the file to UTF-8"
                ) from cause
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as cause:
                raise DataError(f"{where}: not a JSON object on one line: {cause}") from cause
            yield where, row


def _dataset_rows(source: str | Path, split: str, config: str | None) -> Iterable[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as cause:
        raise ImportError(f'reading {source} needs the datasets package: pip install "irlfast[train]"') from cause
    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise DataError(f"{source} has no split {split!r}, only {sorted(loaded)}")
            loaded = loaded[split]
    elif path.is_file():
        loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
    else:
        loaded = datasets.load_dataset(str(source), config, split=split)
    return ((f"{source}[{split}][{i}]", row) for i, row in enumerate(loaded))
