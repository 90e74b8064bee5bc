"""The passes of a case on a device, whichever op it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench import importance, policy_terms
from bench._case import OURS, Case, Pass
from bench.gpu._cases import GpuCase
from bench.gpu._inputs import RIVAL_BARS
from bench.gpu._linear import linear_policy_ref_stats_passes, linear_token_stats_passes
from bench.gpu._vocabulary import token_kl_passes, token_stats_passes


def passes(case: GpuCase, device: str) -> Iterator[Pass]:
    """See bench/_case.py; tensors are on the device."""
    return _OPS[case.op](case, device)


def _on_device(make: Callable[[Case], Iterator[Pass]]) -> Callable[[GpuCase, str], Iterator[Pass]]:
    """Passes of an op whose benchmark needs no change but the device, with the bars of a GPU."""

    def made(case: GpuCase, device: str) -> Iterator[Pass]:
        whole = make(replace(case, work=case.outputs))
        while True:
            # While it makes inputs alone: what runs inside it takes longer.
            with torch.device(device):
                work = next(whole, None)
            if work is None:
                return
            yield replace(work, bars={OURS: RIVAL_BARS})

    return made


_OPS: dict[str, Callable[[GpuCase, str], Iterator[Pass]]] = {
    "token_stats": token_stats_passes,
    "token_kl": token_kl_passes,
    "linear_token_stats": linear_token_stats_passes,
    "linear_policy_ref_stats": linear_policy_ref_stats_passes,
    "policy_terms": _on_device(policy_terms.passes),
    "importance": _on_device(importance.passes),
}
