"""Responses with each token coloured by its reward: blue speaks for the response, orange against it.

The sign shows in the underline too (solid for, dotted against) and the number in the title of each token and in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .svg import number

STEPS = 4


def relative_rewards(row: Mapping[str, Any], level: float) -> list[float | None] | None:
    """The row's token rewards with `level` taken off the response's reward, or None where it has none.

    As TokenRewards.above does for tensors: off every token where their mean is the reward, else an equal share.
    """
    rewards = row.get("token_rewards")
    if not rewards:
        return None
    share = level if row.get("kind") == "mean" else level / len(rewards)
    return [None if reward is None else reward - share for reward in rewards]


def colour_scale(rows: Iterable[Mapping[str, Any]], level: float) -> float:
    """The size at which a token has the strongest colour: nine tenths of all tokens are below it."""
    sizes = sorted(abs(r) for row in rows for r in relative_rewards(row, level) or () if r is not None)
    return sizes[int(0.9 * (len(sizes) - 1))] or sizes[-1] or 1.0 if sizes else 1.0


def coloured_response(row: Mapping[str, Any], level: float, scale: float) -> str:
    """The prompt, and the response's tokens as spans."""
    rewards = relative_rewards(row, level)
    prompt = f'<span class="prompt">{escape(row["prompt"])}</span>'
    if rewards is None:
        return f'<p class="text">{prompt}{escape("".join(row["tokens"]))}</p>'
    spans = [_span(piece, reward, scale) for piece, reward in zip(row["tokens"], rewards, strict=True)]
    return f'<p class="text">{prompt}{"".join(spans)}</p>'


def listed_tokens(row: Mapping[str, Any], level: float) -> str:
    """The tokens and their rewards as text, for those who cannot see the colours or hover."""
    rewards: Sequence[float | None] | None = relative_rewards(row, level)
    if rewards is None:
        return ""
    items = [
        f"<li><code>{escape(_visible(piece))}</code> {'-' if reward is None else f'{reward:+.4g}'}</li>"
        for piece, reward in zip(row["tokens"], rewards, strict=True)
    ]
    return f'<details><summary>Token rewards as numbers</summary><ol class="numbers">{"".join(items)}</ol></details>'


def _span(piece: str, reward: float | None, scale: float) -> str:
    shown = escape(piece).replace("\n", "↵\n")
    if not piece:
        return ""
    if reward is None:
        return f"<span>{shown}</span>"
    step = min(STEPS, int(abs(reward) / scale * STEPS))
    sign = "" if step == 0 else f' class="{"for" if reward > 0 else "against"} s{step}"'
    return f'<span{sign} title="{reward:+.4g}">{shown}</span>'


def _visible(piece: str) -> str:
    return piece.replace(" ", "␣").replace("\n", "↵") or "(part of a character)"


def sample_heading(row: Mapping[str, Any], level: float, scale: float) -> str:
    """The reward, and how many standard deviations it is from what was served on average."""
    if row["reward"] is None:
        return "reward not finite"
    parts = [f"reward {number(row['reward'])}", f"{(row['reward'] - level) / scale:+.2f} σ"]
    parts += [f"{name} {number(value)}" for name, value in row.get("components", {}).items() if value is not None]
    return ", ".join(parts)
