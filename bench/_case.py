"""What an op's benchmark declares: cases, their passes, who takes part, and the bars that irlfast is held against.

An op module `bench/OP.py` has two names: `CASES`, and `passes(case)`, which makes the tensors and yields one `Pass`
after the other. All else (processes, checks, timing, verdicts, tables) is the harness's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Family = Literal["ours", "eager", "compile", "peer", "ceiling", "yardstick"]
FAMILY_NAMES: dict[str, str] = {"eager": "eager PyTorch", "compile": "torch.compile", "peer": "peer"}

# "tuned" keeps freed memory, "default" gives every large block back: see bench/_run.py.
MALLOCS = ("tuned", "default")

OURS = "irlfast"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One piece of work of one size.

    Attributes:
        line: the line of the table in docs/performance.md it belongs to.
        work: the outputs asked of everybody, in words.
        shape: rows first; an op says what the others are.
        mallocs: allocator settings it is measured under.
    """

    op: str
    line: str
    work: str
    shape: tuple[int, ...]
    dtype: str
    mallocs: tuple[str, ...] = MALLOCS

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.line}: {self.work}, {'x'.join(map(str, self.shape))}, {self.dtype}"

    def scaled(self, scale: float) -> Case:
        """With fewer (or more) rows, for a smaller (or larger) machine."""
        return replace(self, shape=(max(1, round(self.shape[0] * scale)), *self.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work.

    Attributes:
        family: "ours"; "eager", "compile" and "peer" rival it; a "ceiling" is work that bounds all of them; a
            "yardstick" is other work, whose own gain is compared with.
        run: does it once, and returns its outputs in the order of the pass's truth.
        prepare: called before each run, outside the timing.
        nbytes: bytes that it has to move at least; 0 for those of the pass.
    """

    name: str
    family: Family
    run: Callable[[], Sequence[Tensor]]
    prepare: Callable[[], None] | None = None
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One output in float64, or the part of it that `select` takes from a contender's."""

    name: str
    value: Tensor
    select: Any = ...


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One figure that irlfast is held against.

    kind        against                        the value, from medians of paired rounds, and how it meets the limit
    speedup     a family                       the best of the family's time / ours, at least
    share       ceilings and how often each    their time / ours, at least
    overrun     ceilings and how often each    ours / their time, at most
    parity      two yardsticks, an op of ours  the best eager form's time / ours, over the same of the yardsticks, at
                and its eager form             least
    peak        a yardstick                    our peak memory / its, at most
    seconds                                    one call, at most
    extra_mib                                  peak memory above inputs and outputs, at most
    error       an output                      largest error against float64, at most, or below the best eager form's

    Attributes:
        malloc: the one setting it applies to; None for all.
        further: a later aim, reported but not asked for yet.
    """

    kind: Literal["speedup", "share", "overrun", "parity", "peak", "seconds", "extra_mib", "error"]
    limit: float
    against: str | Mapping[str, int] = ""
    malloc: str | None = None
    further: bool = False

    def __str__(self) -> str:
        if self.kind == "speedup":
            where = f" ({self.malloc} malloc)" if self.malloc else ""
            return f"at least {self.limit:g} x faster than the best {FAMILY_NAMES[str(self.against)]}{where}"
        if self.kind == "share":
            return f"at least {self.limit:.0%} of {self._floor()} bandwidth{', later' if self.further else ''}"
        if self.kind == "overrun":
            return f"at most {self.limit:.2f} x the bare {self._floor()}"
        if self.kind == "parity":
            return f"at least {self.limit:g} x what {next(iter(self.against))} gains over eager PyTorch"
        if self.kind == "peak":
            return f"at most {self.limit:g} x the peak memory of {self.against}"
        if self.kind == "seconds":
            return f"at most {self.limit * 1e6:g} us a call"
        if self.kind == "extra_mib":
            return f"at most {self.limit:g} MiB above inputs and outputs"
        return f"{self.against} within {self.limit:g} of float64, or nearer than eager"

    def _floor(self) -> str:
        assert not isinstance(self.against, str)
        return " + ".join(name if count == 1 else f"{count} {name}" for name, count in self.against.items())


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One thing to time: its contenders take turns.

    Attributes:
        bars: by the name of each contender of family "ours"; each makes a row of the results.
        truth: the outputs in float64.
        tolerance: relative, in the largest norm and in the sum of magnitudes, beyond which a contender is refused. It
            only has to tell a wrong result from a rounded one; "error" bars ask for accuracy.
        skipped: rivals that cannot take part, with the reason.
        nbytes: bytes that the work has to move at least.
        flop: its floating-point operations, where products dominate.
        grad: whether autograd records the runs.
    """

    name: str
    contenders: Sequence[Contender]
    bars: Mapping[str, Sequence[Bar]]
    truth: Sequence[Truth]
    tolerance: float
    skipped: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0
    flop: int = 0
    grad: bool = True


def judge(bar: Bar, subject: str, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Holds one of our contenders against a bar; `figures` are a row's contenders, ratios being their time / ours.

    The verdict's `met` is None where what the bar is about was not measured.
    """
    value: float | None = None
    against: str | None = None
    met = None
    if bar.kind == "speedup":
        rivals = {name: f["ratio"] for name, f in figures.items() if f["family"] == bar.against}
        if rivals:
            against = min(rivals, key=lambda name: rivals[name])
            value = rivals[against]
            met = value >= bar.limit
    elif bar.kind in ("share", "overrun"):
        assert not isinstance(bar.against, str)
        if all(name in figures for name in bar.against):
            share = sum(count * figures[name]["ratio"] for name, count in bar.against.items())
            value = share if bar.kind == "share" else 1 / share
            met = value >= bar.limit if bar.kind == "share" else value <= bar.limit
    elif bar.kind == "parity":
        assert not isinstance(bar.against, str)
        op, form = bar.against
        eager = {name: f["ratio"] for name, f in figures.items() if f["family"] == "eager"}
        if eager and op in figures and form in figures:
            against = min(eager, key=lambda name: eager[name])
            value = eager[against] * figures[op]["ratio"] / figures[form]["ratio"]
            met = value >= bar.limit
    elif bar.kind == "peak":
        peaks = [figures.get(name, {}).get("peak_mib") for name in (subject, str(bar.against))]
        if peaks[0] is not None and peaks[1]:
            value = peaks[0] / peaks[1]
            met = value <= bar.limit
    elif bar.kind == "seconds":
        value = figures[subject]["median_ms"] / 1e3
        met = value <= bar.limit
    elif bar.kind == "extra_mib":
        value = figures[subject]["extra_mib"]
        met = None if value is None else value <= bar.limit
    else:
        value = figures[subject]["error"][str(bar.against)]
        errors = {n: f["error"][str(bar.against)] for n, f in figures.items() if f["family"] == "eager"}
        against = min(errors, key=lambda name: errors[name]) if errors else None
        met = value <= bar.limit or (against is not None and value <= errors[against])
    return {
        "bar": str(bar),
        "kind": bar.kind,
        "of": bar.against if isinstance(bar.against, str) else [*bar.against],
        "limit": bar.limit,
        "further": bar.further,
        "value": value,
        "against": against,
        "met": met,
    }
