"""The figures of docs/serving.md, made from the file that `python -m bench.serving` wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BLOCK = re.compile(r"(?<=<!-- figures of serve_reward.json -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)


def renew(page: str, figures: Mapping[str, Any]) -> str:
    """The page with these figures.

    Raises:
        ValueError: it has no place for them.
    """
    if not _BLOCK.search(page):
        raise ValueError("the page has no <!-- figures of serve_reward.json --> with <!-- end of figures --> after it")
    return _BLOCK.sub(lambda _: f"\n{text(figures)}\n\n", page)


def text(figures: Mapping[str, Any]) -> str:
    """A table and a list."""
    lines = [
        "| batches | clients | requests/s | p50, ms | p99, ms | rows a batch | processor time a request, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["by_connections"]:
        shown = " | ".join(f"{row[name]:.1f}" for name in ("requests_per_second", "p50_ms", "p99_ms", "rows_per_batch"))
        lines.append(f"| {row['batches']} | {row['connections']} | {shown} | {row['cpu_ms_per_request']:.2f} |")
    exchange, overload, end, machine = (figures[name] for name in ("exchange", "overload", "end", "provenance"))
    alone, taken, refused = figures["scorer_alone"], overload["taken"], overload["refused"]
    lines += [
        "",
        f"- The scorer alone, 64 rows at a time without a server: {alone['rows_per_second']:.1f} rows/s, "
        f"{alone['cpu_ms_per_row']:.2f} ms of processor time a row.",
        f"- {exchange['exchanges']} rewards exchanged under {exchange['connections']} clients: {exchange['requests']} "
        f"requests, {exchange['lost']} lost, {exchange['other_than_200']} answered with an error, "
        f"{exchange['answers_unlike_their_version']} answers unlike those of the version in their header; "
        f"{exchange['seconds_to_exchange'] * 1000:.0f} ms to exchange (median), p99 {exchange['p99_ms']:.1f} ms.",
        f"- Overload: {overload['offered_per_second']:.1f} requests/s offered, whatever the answers, with room for "
        f"{overload['queue_size']} rows: {overload['refused_share']:.1%} of {overload['requests']} refused with 503 "
        f"(p99 {_ms(refused)}), {overload['taken_per_second']:.1f} taken a second with p50 {taken['p50_ms']:.1f} ms "
        f"and p99 {taken['p99_ms']:.1f} ms; {overload['lost']} lost, {overload['other_statuses']} other errors.",
        f"- Told to stop under {end['connections']} clients: {end['requests']} requests, {end['lost']} lost, "
        f"{end['other_than_200']} answered with an error, ended after {end['seconds_to_end']:.2f} s with status "
        f"{end['exit_status']}.",
        f"- {figures['rows']} rows of {figures['tokens_per_row']} tokens (mean); threads of the model: "
        f"{figures['threads']}; {machine['cores']} cores ({machine['machine']}), shared with the clients; load average "
        f"at the end {machine['load_average'][0]:.1f}.",
    ]
    return "\n".join(lines)


def _ms(latency: Mapping[str, float] | None) -> str:
    return "none" if latency is None else f"{latency['p99_ms']:.1f} ms"
