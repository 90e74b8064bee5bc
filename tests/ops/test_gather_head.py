"""Heads that are DTensors: FSDP2's, gathered and their gradient averaged, and slices of a split vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vocabulary_cases import DEPTH, VOCAB, Case, batch

from irlfast.ops import gather_head, linear_token_stats, linear_token_stats_reference
from irlfast.ops.gather_head import _shares

Found = list[dict[str, Any]]


def differentiated(scale: Tensor) -> list[Tensor]:
    """The log-probs of the whole batch, and the gradients of their sum times scale [N]."""
    given = batch(Case(4, "float64"))
    leaves = [t.requires_grad_() for t in (given.hidden, given.weight, given.bias)]
    logprob = linear_token_stats_reference(*leaves[:2], given.labels, bias=leaves[2]).logprob
    return [logprob.detach(), *torch.autograd.grad((logprob * scale).sum(), leaves)]


@pytest.mark.parametrize("kind", ["group", "replicated"])
def test_a_dtensor_may_be_a_slice(ranks: Found, kind: str) -> None:
    expected = differentiated(batch(Case(4, "float64")).upstream[0])
    for rank in ranks:
        for value, truth in zip(rank["dtensors"][kind], expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


def test_without_a_group_each_rank_has_rows_of_its_own(ranks: Found) -> None:
    """Rows 2 r and 2 r + 1; the head's gradient is the mean over the ranks, as FSDP2 makes it."""
    scale = batch(Case(4, "float64")).upstream[0]
    scale[8] = 0.0
    logprob, of_hidden, of_weight, of_bias = differentiated(scale)
    for number, rank in enumerate(ranks):
        mine = slice(2 * number, 2 * number + 2)
        expected = [logprob[mine], of_hidden[mine], of_weight / 4, of_bias / 4]
        for value, truth in zip(rank["dtensors"]["gathered"], expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)
        assert rank["dtensors"]["placement"] == "(Shard(dim=0),)"


def test_gathered_once_for_two_calls_in_two_steps(ranks: Found) -> None:
    given = batch(Case(4, "float64"))
    weight = given.weight.clone().requires_grad_()
    logprob = linear_token_stats_reference(given.hidden[:8], weight, given.labels[:8]).logprob
    (expected,) = torch.autograd.grad(2 * logprob.sum() / 4, weight)
    for rank in ranks:
        # 1251 columns a rank, of which a buffer has 1000.
        assert rank["dtensors"]["twice"] == {"gathered": 2, "reduced": 0, "others": 0}
        torch.testing.assert_close(rank["dtensors"]["twice gradient"], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rank["dtensors"]["loss gradient"], expected / 2, rtol=1e-10, atol=1e-10)


def test_ranks_without_rows_and_another_type(ranks: Found) -> None:
    """Five rows over four ranks: two, two, one, none."""
    expected = batch(Case(4, "float64")).weight[:5].to(torch.bfloat16)
    assert all(torch.equal(rank["dtensors"]["half"], expected) for rank in ranks)
    assert [_shares(5, 4), _shares(8, 4), _shares(3, 4)] == [[2, 2, 1, 0], [2, 2, 2, 2], [1, 1, 1, 0]]


def test_a_plain_head_is_returned() -> None:
    weight = torch.randn(3, 2)
    assert gather_head(weight) is weight
    assert gather_head(weight, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("apart", "kind"), [(True, "DTensor"), (False, "Parameter")])
def test_fsdp2_trains_as_one_process_does(ranks: Found, apart: bool, kind: str) -> None:
    """Two steps of SGD on the mean over all ranks' rows, the head sharded or gathered by its root when it is taken."""
    torch.manual_seed(0)
    embedding, layer = torch.nn.Embedding(VOCAB, DEPTH), torch.nn.Linear(DEPTH, DEPTH)
    head = torch.nn.Linear(DEPTH, VOCAB, bias=False)
    model = torch.nn.ModuleDict({"embedding": embedding, "layer": layer, "head": head})
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(2):
        of_ranks = []
        for number in range(4):
            tokens = torch.arange(6).view(2, 3) * 37 + 11 * number + step
            hidden = torch.tanh(layer(embedding(tokens)))
            of_ranks.append(-linear_token_stats(hidden, head.weight, tokens + 1).logprob.mean())
        torch.stack(of_ranks).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(torch.stack(of_ranks).detach())
    for number, rank in enumerate(ranks):
        found = rank[f"fsdp {apart}"]
        assert found["kinds"] == [kind, kind]
        torch.testing.assert_close(found["losses"], torch.stack([loss[number] for loss in losses]))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found["parameters"][name], value, rtol=1e-5, atol=1e-6)
