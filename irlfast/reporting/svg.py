"""Small charts as inline SVG. Colours are classes of the page's style, so they follow its light and dark form.

Two series are told apart by more than their colour: by a dashed line and hollow marks, or a hatched area. Each mark has
a title with its number, which browsers show under the pointer; the whole has a description for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36


@dataclass(frozen=True, kw_only=True)
class Series:
    """points: (x, y), x ascending. style: "policy" (solid) or "expert" (dashed)."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "policy"


def number(value: float) -> str:
    """A number at four significant digits, without needless zeros."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        return f"{value:.2e}"
    text = f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def line_chart(
    title: str, series: Sequence[Series], *, level: float | None = None, level_label: str = "", x: str = "iteration"
) -> str:
    """Lines against x.

    Args:
        title: for the description.
        series: at least one, none without points.
        level, level_label: a horizontal line to compare with.
        x: what x counts.
    """
    xs = [point[0] for line in series for point in line.points]
    ys = [point[1] for line in series for point in line.points] + ([] if level is None else [level])
    low, high = _padded(min(ys), max(ys))
    first, last = min(xs), max(xs)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        share = (point[0] - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT), _y(point[1], low, high)

    body = [_grid(low, high, first, last, x)]
    if level is not None:
        y = _y(level, low, high)
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        above = y - 4 if y > TOP + 16 else y + 12
        body.append(
            f'<text class="note" x="{WIDTH - RIGHT}" y="{above:.1f}" text-anchor="end">{escape(level_label)}</text>'
        )
    for line in series:
        places = [place(point) for point in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        body.append(f'<polyline class="line {line.style}" points="{path}"/>')
        # Among many points marks would hide the line: the last one stays.
        marked = list(zip(places, line.points, strict=True))
        for (px, py), point in marked if len(marked) <= 60 else marked[-1:]:
            text = f"{line.label}, {x} {number(point[0])}: {number(point[1])}"
            body.append(_mark(px, py, line.style, text))
    ends = "; ".join(f"{s.label} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    return _svg(f"{title}: {ends}", body)


def histograms(title: str, policy: Sequence[float], expert: Sequence[float], bounds: tuple[float, float]) -> str:
    """Shares of the policy's rewards (filled) and of the demonstrations' (hatched) over the same bins."""
    bins = 24
    low, high = bounds
    shares = {name: _bins(values, low, high, bins) for name, values in (("policy", policy), ("expert", expert))}
    top = max(max(share) for share in shares.values()) or 1.0
    body = [_grid(0.0, top * 1.05, low, high, "reward", percent=True)]
    width = (WIDTH - LEFT - RIGHT) / bins
    floor = _y(0.0, 0.0, top * 1.05)
    for name, label in (("policy", "policy"), ("expert", "demonstrations")):
        for index, share in enumerate(shares[name]):
            if share <= 0:
                continue
            y = _y(share, 0.0, top * 1.05)
            edges = [low + (high - low) * (index + step) / bins for step in (0, 1)]
            text = f"{label}: {share:.0%} between {number(edges[0])} and {number(edges[1])}"
            body.append(
                f'<rect class="bar {name}" x="{LEFT + index * width:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{floor - y:.1f}"><title>{escape(text)}</title></rect>'
            )
    means = ", ".join(
        f"{label} {number(sum(values) / len(values))}"
        for label, values in (("policy", policy), ("demonstrations", expert))
    )
    return _svg(f"{title}. Mean rewards: {means}", body)


def hatching() -> str:
    """The pattern that "expert" bars are filled with; once a page."""
    return (
        '<svg width="0" height="0" aria-hidden="true" focusable="false"><defs><pattern id="hatch" width="5" height="5" '
        'patternTransform="rotate(45)" patternUnits="userSpaceOnUse"><line class="hatch" x1="0" y1="0" x2="0" y2="5"/>'
        "</pattern></defs></svg>"
    )


def _svg(description: str, body: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
        f"{''.join(body)}</svg>"
    )


def _mark(x: float, y: float, style: str, text: str) -> str:
    title = f"<title>{escape(text)}</title>"
    if style == "expert":
        return f'<rect class="mark expert" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{title}</rect>'
    return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'


def _grid(low: float, high: float, first: float, last: float, x: str, *, percent: bool = False) -> str:
    parts = []
    for tick in _ticks(low, high, 4):
        y = _y(tick, low, high)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{tick:.0%}" if percent else number(tick)
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    # Iterations are whole.
    for tick in _ticks(first, last, 4, least=1.0 if x == "iteration" else 0.0):
        share = (tick - first) / (last - first) if last > first else 0.5
        at = LEFT + share * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="note" x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x)}</text>')
    return "".join(parts)


def _y(value: float, low: float, high: float) -> float:
    return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room above and below, and a hundredth of the size at least: else rounding looks like a story."""
    room = max(0.08 * (high - low), 0.005 * max(abs(low), abs(high), 1.0))
    return low - room, high + room


def _ticks(low: float, high: float, count: int, *, least: float = 0.0) -> list[float]:
    """Round numbers inside [low, high], about `count` of them, at least `least` apart."""
    if high <= low:
        return [low]
    raw = max((high - low) / count, least)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * scale >= raw)
    start = math.ceil(low / step - 1e-9)
    return [index * step for index in range(start, math.floor(high / step + 1e-9) + 1)]


def _bins(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    """Share of the values in each of `bins` equal parts of [low, high]."""
    counts = [0] * bins
    for value in values:
        share = (value - low) / (high - low) if high > low else 0.5
        counts[min(bins - 1, max(0, int(share * bins)))] += 1
    return [count / len(values) for count in counts]
