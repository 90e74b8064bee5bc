"""A vocabulary split over ranks: 2 and 4 gloo processes against one, their bits, errors, and how parts are merged."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vocabulary_cases import CASES, CUTS, VOCAB, Batch, Case, batch

from irlfast.ops import (
    _vocabulary,
    linear_policy_ref_stats_reference,
    linear_token_stats,
    linear_token_stats_reference,
    token_kl_reference,
    token_stats_reference,
)
from irlfast.ops._linear import Rows, finish
from irlfast.ops._linear_pair import _finish_pair
from irlfast.ops._vocabulary import ELSEWHERE, IGNORED, OUTSIDE, Slice, merge_parts, merge_parts_reference

Found = list[dict[str, Any]]

# Statistics in float32 and float64; gradients are rounded to their type, bfloat16's factors of them too.
CLOSE = {"float32": 2e-5, "float64": 1e-11, "bfloat16": 2e-5}
CLOSE_GRADIENT = {"float32": 5e-5, "float64": 1e-11, "bfloat16": 6e-2}


def members(case: Case) -> list[list[int]]:
    """Ranks of each group, in its order."""
    return [[0, 1], [2, 3]] if case.ranks == 2 else [[0, 1, 2, 3]]


def exact(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics and gradients of hidden, weight and bias from the whole head, in float64."""
    given = batch(case)
    leaves = [t.double().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
    options = {name: value for name, value in case.options.items() if name != "temperatures"}
    if case.options.get("temperatures"):
        options["temperature"] = given.temperature.double()
    if case.op == "pair":
        ref = given.ref_hidden.double(), given.ref_weight.double()
        stats: Any = linear_policy_ref_stats_reference(*leaves[:2], *ref, given.labels, bias=leaves[2], **options)
        outputs = [stats.logprob, stats.entropy, stats.lse, stats.reverse_kl, stats.forward_kl]
    elif case.op == "logits":
        leaves = [(given.hidden @ given.weight.T + given.bias).double().requires_grad_()]
        stats = token_stats_reference(leaves[0], given.labels, **options)
        outputs = list(stats)
    else:
        stats = linear_token_stats_reference(*leaves[:2], given.labels, bias=leaves[2], **options)
        outputs = list(stats)
    upstream = given.upstream[: len(outputs)]
    finite = [(o * u).masked_fill(o.isinf(), 0.0).sum() for o, u in zip(outputs, upstream, strict=True)]
    gradients = torch.autograd.grad(sum(finite), leaves)
    return [s.detach() for s in stats], list(gradients)


def error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; equal infinities agree."""
    result, truth = result.double(), truth.double()
    difference = (result - truth).abs().masked_fill(result == truth, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one(ranks: Found, name: str) -> None:
    case = CASES[name]
    statistics, gradients = exact(case)
    for group in members(case):
        for place, rank in enumerate(group):
            found = ranks[rank][name]
            for value, truth in zip(found["stats"], statistics, strict=True):
                assert value.dtype == (torch.float64 if case.dtype == "float64" else torch.float32)
                assert error(value, truth) <= CLOSE[case.dtype]
            part = case.part(place)
            mine = [gradients[0][:, part]] if case.op == "logits" else [gradients[0], *(g[part] for g in gradients[1:])]
            for value, truth in zip(found["gradients"], mine if case.trained else mine[:1], strict=True):
                assert value.dtype == case.torch_dtype
                assert value.shape == truth.shape
                assert error(value, truth) <= CLOSE_GRADIENT[case.dtype]


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_the_same_bits_in_every_run(ranks: Found, name: str) -> None:
    """Of all statistics and of the hidden states' gradient; ranks beside them do not show."""
    case = CASES[name]
    first = ranks[0][name]
    for rank in ranks:
        for value, expected in zip(rank[name]["stats"], first["stats"], strict=True):
            assert torch.equal(value, expected)
        assert case.op == "logits" or torch.equal(rank[name]["gradients"][0], first["gradients"][0])
        again = rank[f"{name} again"]
        for kind in ("stats", "gradients"):
            assert all(torch.equal(a, b) for a, b in zip(rank[name][kind], again[kind], strict=True))
    if case.inputs not in ("all ignored", "no rows"):
        assert bool(first["gradients"][0][0].any())
        assert not bool(first["gradients"][0][1:3].any())  # ignored; without an upstream gradient


def test_one_collective_each_way(ranks: Found) -> None:
    """And, on the CPU, one before them, of what the ranks were given."""
    assert all(rank["collectives"] == {"gathered": 2, "reduced": 1, "others": 0} for rank in ranks)


SAID = {
    "width": "weight has shape (2048, 15), expected [V, 16] for hidden (9, 16)",
    "three dimensions": "weight has shape (1, 2048, 16), expected [V, 16]",
    "no column": "weight has shape (0, 16), expected [V, 16]",
    "type": "weight is torch.float64, hidden torch.float32; convert one",
    "rows": "rows differ between the ranks of the group: [9, 8, 9, 9]",
    "labels": "labels differ between the ranks",
    "softcap": "softcaps differ between the ranks",
    "temperature": "temperatures differ between the ranks",
    "mode": "mode='fast' is unknown",
    "fused": "mode='fused' takes a whole vocabulary, this one is split",
    "impl": "impl='cuda' is unknown",
    "gradient": "needs of a gradient differ between the ranks",
    "label": "labels[4] = 5003 is outside [0, 5003)",
}


@pytest.mark.parametrize("what", SAID)
def test_what_one_rank_is_refused_all_are(ranks: Found, what: str) -> None:
    for number, rank in enumerate(ranks):
        said = rank["refusals"][what]
        assert SAID[what] in said
        if what in ("width", "three dimensions", "no column", "type", "mode", "impl") and number != 1:
            assert said.startswith("ValueError: linear_token_stats: rank 1 of the group refused its arguments: ")
        assert rank["refusals"]["afterwards"] == "accepted"


def test_a_wrong_merge_would_be_noticed(ranks: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are added without rescaling, or labels that are not dropped where they are not: neither is close."""
    statistics, _ = exact(CASES["recompute float64 4"])
    parts, inverse, labels = _parts(batch(CASES["recompute float64 4"]), CUTS[4])

    def close(running: Tensor) -> bool:
        finished = finish(running, Rows(labels, 1 / inverse, 1.0, 0.0), torch.float64)
        kept = labels != -100
        return all(error(a[kept], b[kept]) < 1e-9 for a, b in zip(finished, statistics, strict=False))

    options = CASES["recompute float64 4"].options["softcap"]
    assert options == 12.0
    assert close(merge_parts(parts, inverse))
    monkeypatch.setattr(_vocabulary, "_merge_softmax", lambda a, b, _: (torch.maximum(a[0], b[0]), a[1] + b[1], a[2]))
    assert not close(merge_parts(parts, inverse))


def _parts(given: Batch, cuts: list[int], *, pair: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics of each part by the definition, with 0 for the logits of labels elsewhere."""
    softcap = 12.0
    logits = given.hidden.double() @ given.weight.double().T + given.bias.double()
    ref_logits = given.ref_hidden.double() @ given.ref_weight.double().T
    inverse = 1 / given.temperature.double()
    capped, ref_capped = (softcap * (x / softcap).tanh() for x in (logits, ref_logits))
    parts = []
    for begin, end in pairwise(cuts):
        here = (given.labels >= begin) & (given.labels < end)
        of_policy = _running(capped, begin, end, inverse, given.labels, here)
        if not pair:
            parts.append(torch.stack(of_policy))
            continue
        of_ref = _running(ref_capped, begin, end, inverse, given.labels, here)
        x, y = (
            ((z[:, begin:end] - running[0][:, None]) * inverse[:, None])
            for z, running in ((capped, of_policy), (ref_capped, of_ref))
        )
        sums = [(x.exp() * (x - y)).sum(1), (y.exp() * (y - x)).sum(1)]
        parts.append(torch.stack([*of_policy, of_ref[0], of_ref[1], of_ref[3], *sums]))
    return torch.stack(parts), inverse, given.labels


def _running(
    z: Tensor, begin: int, end: int, inverse: Tensor, labels: Tensor, here: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    part = z[:, begin:end]
    maximum, place = part.max(1)
    x = (part - maximum[:, None]) * inverse[:, None]
    x = torch.where(part == -math.inf, -math.inf, x)
    e = x.exp().scatter(1, place[:, None], 0.0)
    label = z.gather(1, labels.clamp(min=0)[:, None])[:, 0].where(here, 0.0)
    return maximum, e.sum(1), torch.where(e > 0, e * x, 0.0).sum(1), label


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.integers(1, VOCAB - 1), max_size=5, unique=True),
    shift=st.floats(-200, 200),
    seed=st.integers(0, 2**16),
)
def test_any_split_is_the_whole(cuts: list[int], shift: float, seed: int) -> None:
    """Parts merged in order equal the statistics of all columns, and the reference of the merge."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, VOCAB, generator=generator, dtype=torch.float64) + shift
    logits[0, : VOCAB // 2] = -math.inf  # often a whole part
    logits[1, 7] = logits[1, 4000] = logits[1].max() + 1  # a tie across parts
    labels = torch.tensor([VOCAB - 1, 7, 0, 1234, 5000])
    bounds = [0, *sorted(cuts), VOCAB]
    one = torch.ones(5, dtype=torch.float64)
    parts = []
    for begin, end in pairwise(bounds):
        here = (labels >= begin) & (labels < end)
        part = torch.stack(_running(logits, begin, end, one, labels, here))
        part[:3] = torch.where(part[0] == -math.inf, torch.tensor([-math.inf, 0.0, 0.0]).double()[:, None], part[:3])
        parts.append(part)
    merged = merge_parts(torch.stack(parts), 1.0)
    finished = finish(merged, Rows(labels, None, 1.0, 0.0), torch.float64)
    truth = token_stats_reference(logits, labels)
    for value, expected in zip(finished, truth, strict=False):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    lse, entropy, label = merge_parts_reference(torch.stack(parts))
    torch.testing.assert_close(torch.stack([lse, entropy, label - lse]), torch.stack(
        [truth.lse, truth.entropy, truth.logprob]), rtol=1e-11, atol=1e-11)  # fmt: skip


@pytest.mark.parametrize("cuts", [CUTS[2], CUTS[4], [0, VOCAB]], ids=str)
def test_any_split_of_a_pair_is_the_whole(cuts: list[int]) -> None:
    given_batch = batch(Case(4, "float64"))
    parts, inverse, labels = _parts(given_batch, cuts, pair=True)
    merged = merge_parts(parts, inverse)
    rows = Rows(labels.clamp(min=0), 1 / inverse, 1.0, 0.0)
    _, reverse, forward = _finish_pair(merged, rows)
    logits = given_batch.hidden @ given_batch.weight.T + given_batch.bias
    ref_logits = given_batch.ref_hidden @ given_batch.ref_weight.T
    for value, kind in ((reverse, "reverse"), (forward, "forward")):
        truth = token_kl_reference(logits, ref_logits, kind=kind, temperature=1 / inverse, softcap=12.0)  # type: ignore[arg-type]
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


def test_labels_of_a_slice() -> None:
    part = Slice(group=None, first=10, columns=5, vocab=20)
    labels = torch.tensor([9, 10, 14, 15, 3, 20, -1, -7, 12])
    local = part.localise(labels, 3)
    assert local.tolist() == [ELSEWHERE, 0, 4, ELSEWHERE, IGNORED, OUTSIDE, OUTSIDE, OUTSIDE, 2]
    assert part.localise(labels, 12).tolist()[-1] == IGNORED
    assert part.localise(labels, -7).tolist()[-2] == IGNORED


def test_a_group_of_one_is_no_group(tmp_path: Path) -> None:
    """In this process: the whole head is the slice, and the bits those without a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        given_batch = batch(Case(2))
        for mode in ("recompute", "keep", "frozen"):
            runs = []
            for group in (torch.distributed.group.WORLD, None):
                hidden = given_batch.hidden.clone().requires_grad_()
                stats = linear_token_stats(
                    hidden,
                    given_batch.weight,
                    given_batch.labels,
                    group=group,
                    mode=mode,
                    softcap=9.0,  # type: ignore[arg-type]
                )
                if group is not None:
                    with pytest.raises(RuntimeError, match="no second derivative"):
                        torch.autograd.grad(stats.logprob.sum(), hidden, create_graph=True)
                gradients = torch.autograd.grad(stats, hidden, list(given_batch.upstream[:3].float()))
                runs.append([*stats, *gradients])
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_the_page_s_example(tmp_path: Path) -> None:
    """As it is printed, by torchrun."""
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    (tmp_path / "split.py").write_text(page.split("```python\n")[1].split("```")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "split.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    # Two processes write to one pipe: their lines may run into each other.
    said = sorted(re.findall(r"rank (\d): loss ([-\d.]+), gradient of \((\d+), 32\)", done.stdout))
    assert [(rank, rows) for rank, _, rows in said] == [("0", "700"), ("1", "300")], done.stdout
    assert said[0][1] == said[1][1]
