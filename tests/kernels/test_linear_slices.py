"""The Triton epilogues over slices of a vocabulary: the ranks one after the other, in one process, without a group."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from linear_cases import PIECE, Problem, problem
from torch import Tensor
from triton_cases import error

from irlfast.ops import _vocabulary
from irlfast.ops._linear_pair_triton import TritonPairEpilogue
from irlfast.ops._linear_parallel import linear_policy_ref_stats_over_group, linear_token_stats_over_group
from irlfast.ops._linear_triton import TritonEpilogue
from irlfast.ops._vocabulary import Slice
from irlfast.ops.linear_policy_ref_stats import linear_policy_ref_stats_reference
from irlfast.ops.linear_token_stats import linear_token_stats_reference

VOCAB = 2 * PIECE + 104
CUTS = [0, 3, PIECE + 5, VOCAB]  # three columns; a chunk and two more; the rest


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Ranks:
    """Runs a call for each slice twice: first to see what each sends, then with what all have sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: dict[int, Tensor] = {}
        monkeypatch.setattr(_vocabulary, "all_gather", self.gather)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: len(CUTS) - 1)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)

    def gather(self, parts: Tensor, mine: Tensor, group: Any) -> None:
        self.sent[group] = mine.clone()
        for rank, part in enumerate(parts):
            part.copy_(self.sent.get(rank, mine))

    def run(self, op: str, mode: str, inputs: Problem, upstream: Tensor, **options: Any) -> list[list[Tensor]]:
        """Statistics and gradients of each rank, those of hidden states not yet summed."""
        for _ in range(2):
            results = []
            for rank, (first, end) in enumerate(pairwise(CUTS)):
                own = inputs.hidden, inputs.weight[first:end], inputs.bias[first:end]
                leaves = [t.detach().requires_grad_() for t in own]
                part = Slice(group=rank, first=first, columns=end - first, vocab=VOCAB)
                shared = {"bias": leaves[2], "softcap": None, "temperature": 1.0, "ignore_index": -100, "chunk": None}
                shared |= options
                if op == "pair":
                    ref = inputs.hidden * 0.9, inputs.weight[first:end]
                    stats: Any = linear_policy_ref_stats_over_group(
                        TritonPairEpilogue, *leaves[:2], *ref, inputs.labels, part, ref_bias=None, **shared
                    )
                    outputs = [*stats[:3], *stats[4:]]
                else:
                    trained = mode != "frozen"
                    leaves = [leaves[0], *(leaf.requires_grad_(trained) for leaf in leaves[1:])]
                    stats = linear_token_stats_over_group(
                        TritonEpilogue, *leaves[:2], inputs.labels, part, mode=mode, **shared
                    )
                    outputs = list(stats)
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                grads = list(upstream[: len(outputs)].to(outputs[0]))
                results.append([*(s.detach() for s in stats), *torch.autograd.grad(outputs, wanted, grads)])
        return results


@pytest.fixture
def over_ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def upstream_for(inputs: Problem) -> Tensor:
    upstream = torch.randn(5, len(inputs.labels), generator=torch.Generator().manual_seed(1))
    upstream[:, 4:5] = 0
    return upstream.to(inputs.labels.device)


@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "temperature": 0.7}], ids=["", "scaled"])
@pytest.mark.parametrize("mode", ["recompute", "keep", "frozen"])
def test_slices_together_are_the_whole(device: str, mode: str, options: dict[str, Any], over_ranks: Ranks) -> None:
    inputs = problem(vocab=VOCAB, device=device)
    inputs.hidden[1] = math.nan  # ignored
    upstream = upstream_for(inputs)
    results = over_ranks.run("stats", mode, inputs, upstream, **options)
    inputs.hidden[1] = 0.0  # the reference's own gradient of the weight would be NaN
    leaves = [t.cpu().double().requires_grad_() for t in inputs[:3]]
    exact = linear_token_stats_reference(*leaves[:2], inputs.labels.cpu(), bias=leaves[2], **options)
    truth = torch.autograd.grad(exact, leaves, list(upstream[:3].cpu().double()))
    for result in results:
        assert all(error(value, right.detach()) <= 1e-5 for value, right in zip(result[:3], exact, strict=True))
        assert all(torch.equal(value, first) for value, first in zip(result[:3], results[0][:3], strict=True))
    assert error(torch.stack([result[3] for result in results]).sum(0), truth[0]) <= 3e-5
    if mode != "frozen":
        for place in (1, 2):
            assert error(torch.cat([result[3 + place] for result in results]), truth[place]) <= 3e-5


def test_slices_of_a_pair_together_are_the_whole(device: str, over_ranks: Ranks) -> None:
    inputs = problem(vocab=VOCAB, device=device)
    upstream = upstream_for(inputs)
    results = over_ranks.run("pair", "", inputs, upstream)
    leaves = [t.cpu().double().requires_grad_() for t in inputs[:3]]
    ref = inputs.hidden.cpu().double() * 0.9, inputs.weight.cpu().double()
    exact = linear_policy_ref_stats_reference(*leaves[:2], *ref, inputs.labels.cpu(), bias=leaves[2])
    truth = torch.autograd.grad([*exact[:3], *exact[4:]], leaves, list(upstream.cpu().double()))
    for result in results:
        assert all(error(value, right.detach()) <= 2e-5 for value, right in zip(result[:6], exact, strict=True))
    assert error(torch.stack([result[6] for result in results]).sum(0), truth[0]) <= 1e-4
    for place in (1, 2):
        assert error(torch.cat([result[6 + place] for result in results]), truth[place]) <= 1e-4


@pytest.mark.parametrize("mode", ["recompute", "frozen"])
def test_a_label_outside_all_slices_makes_its_row_nan_alone(device: str, mode: str, over_ranks: Ranks) -> None:
    inputs = problem(vocab=VOCAB, device=device)
    inputs.labels[2] = VOCAB
    for result in over_ranks.run("stats", mode, inputs, torch.ones(5, 5, device=device)):
        for value in (*result[:3], result[3].sum(1)):
            assert value.isnan().tolist() == [False, False, True, False, False]
