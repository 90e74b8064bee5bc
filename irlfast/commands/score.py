"""``irlfast score``: new text by a learned reward."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from irlfast.data import DataError, Demonstration, load_demonstrations
from irlfast.iq_scorer import load_scorer
from irlfast.scorer import TextForm
from irlfast.train.config import require

from .language_model import pick_device


@dataclass(frozen=True, kw_only=True)
class ScoreCommand:
    """Score new text by a learned reward: raw, normalised, and token by token where the reward model gives that."""

    reward: Path
    """The reward's folder, a checkpoint (step-N) or the folder of a run (bilevel or iq), whose newest checkpoint is
    taken."""
    input: Path
    """JSON lines (.gz too) with {"prompt", "response"}, {"messages"} or {"text"} rows."""
    output: Path | None = None
    """Where to write JSON lines, one a row of the input in its order; without it they go to standard output."""
    model: str | None = None
    """Folder or hub name of the language model whose states the reward reads (for a backbone: of the tokenizer; for an
    IQ-trained model: of the one that log_ratio is relative to), where it is not the one recorded with the reward."""
    tokens: bool = True
    """Also write the response's tokens and their rewards."""
    prompt_tokens: int | None = None
    """Prompt length of plain text, in tokens; by default the run's own, or 32."""
    max_response_tokens: int | None = None
    """Longer responses are cut here and have no EOS, as in training; by default the run's own, or no limit."""
    batch_size: int = 32
    """Sequences in one pass."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""
    limit: int | None = None
    """Read so many rows at most."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_response_tokens", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


def run_score(command: ScoreCommand) -> int:
    """Score every row; a row that cannot be judged says why under "error", and the exit status is then 1."""
    device = pick_device(command.device)
    rows = load_demonstrations(command.input, limit=command.limit)
    scorer = load_scorer(command.reward, model=command.model, device=device, batch_size=command.batch_size)
    scorer.form = _form(command, scorer.form)
    failed = 0
    with ExitStack() as stack:
        out = sys.stdout if command.output is None else stack.enter_context(command.output.open("w", encoding="utf-8"))
        # A few batches at a time, so that a long file shows its first rows soon and is never whole in memory.
        for low in range(0, len(rows), 8 * command.batch_size):
            part = rows[low : low + 8 * command.batch_size]
            for row, answer in zip(part, scorer.score(part, tokens=command.tokens), strict=True):
                failed += isinstance(answer, DataError)
                said = {"error": str(answer)} if isinstance(answer, DataError) else answer.to_json()
                print(json.dumps({**_text(row), **said}, ensure_ascii=False), file=out)
    if failed:
        print(f"irlfast: {failed} of {len(rows)} rows could not be judged: see their error", file=sys.stderr)
    return 1 if failed else 0


def _form(command: ScoreCommand, trained: TextForm) -> TextForm:
    names = ("prompt_tokens", "max_response_tokens")
    given = {name: getattr(command, name) for name in names if getattr(command, name) is not None}
    return replace(trained, **given)


def _text(row: Demonstration) -> dict[str, object]:
    if row.is_text:
        return {"source": row.source, "text": row.response}
    if row.messages is not None:
        turns = [{"role": turn.role, "content": turn.content} for turn in row.messages]
        return {"source": row.source, "messages": [*turns, {"role": "assistant", "content": row.response}]}
    return {"source": row.source, "prompt": row.prompt, "response": row.response}
