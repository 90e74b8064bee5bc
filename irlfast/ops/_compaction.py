"""Leaving rows with an ignored label out without asking the device how many there are: the host says it beforehand.

A data loader knows how many tokens of a batch have a label. With that number, or a larger one, K, shapes are known: the
K rows are found by a prefix sum over the labels, on the device, and what follows sees a batch of K. Slots that no row
takes have the first row's hidden states and an ignored label: they cost their part of the products, and give nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Compaction(NamedTuple):
    """K rows of N: which, and where each row's result is."""

    places: Tensor  # (K) int64, rows of the batch, 0 in slots that none takes
    vacant: Tensor  # (K) bool
    slots: Tensor  # (N) int64: a row's slot, K where it is ignored, K + 1 where there are more labels than slots


def compaction(labels: Tensor, ignore_index: int, most: int) -> Compaction:
    """Of labels [N]; nothing waits for the device."""
    labelled = labels != ignore_index
    number = labelled.cumsum(0) - 1
    fits = labelled & (number < most)
    rows = torch.arange(len(labels), device=labels.device)
    # Whatever row comes last to slot K, which is cut off.
    places = labels.new_zeros(most + 1).scatter_(0, torch.where(fits, number, most), rows)[:most]
    vacant = torch.arange(most, device=labels.device) >= labelled.sum()
    slots = torch.where(fits, number, torch.where(labelled, most + 1, most))
    return Compaction(places, vacant, slots)


def over_labelled_rows(
    op: str,
    run: Callable[[list[Tensor], Tensor, float | Tensor], Any],
    states: list[Tensor],  # (..., D) each
    labels: Tensor,  # (...)
    temperature: float | Tensor,
    ignore_index: int,
    most: int,
) -> Any:
    """What `run` makes of the rows with a label, at most `most` of them, in a named tuple of tensors [...].

    Ignored rows hold 0, and rows beyond `most` NaN, where they cannot be refused.

    Raises:
        ValueError: most is negative, or on the CPU less than there are labels.
    """
    if most < 0:
        raise ValueError(f"{op}: max_rows = {most} is negative; expected how many rows have a label, or more")
    if any(state.ndim == 0 or state.shape[:-1] != labels.shape for state in states):
        return run(states, labels, temperature)  # which says what is wrong
    flat = labels.reshape(-1).long()
    if labels.is_cpu and not torch.compiler.is_compiling() and type(flat) is Tensor:
        count = int((flat != ignore_index).sum())
        if count > most:
            raise ValueError(f"{op}: {count} rows have a label, and max_rows = {most}")
    of = compaction(flat, ignore_index, most) if len(flat) else None
    if of is None:
        return run(states, labels, temperature)
    few_states = [state.reshape(-1, state.shape[-1]).index_select(0, of.places) for state in states]
    few_labels = flat.index_select(0, of.places).masked_fill(of.vacant, ignore_index)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1).index_select(0, of.places)
    result = run(few_states, few_labels, temperature)

    def spread(values: Tensor) -> Tensor:
        beyond = torch.tensor([0.0, torch.nan], dtype=values.dtype, device=values.device)
        return torch.cat([values, beyond]).index_select(0, of.slots).view(labels.shape)

    return type(result)(*map(spread, result))
