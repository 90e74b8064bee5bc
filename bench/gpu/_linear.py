"""Passes of the linear ops on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench import _peers
from bench._case import OURS, Contender, Family, Pass, Truth
from bench._ceilings import product_ceilings
from bench.gpu._cases import FROZEN, LINEAR_BOTH, GpuCase
from bench.gpu._cost import FORWARD, WITH_DX, WITH_DX_DW, costs, counted_flop
from bench.gpu._inputs import RIVAL_BARS, TOLERANCES, Targets, edge_rows, make_targets, with_softcap
from bench.linear_policy_ref_stats import TRAINED, by_log_softmax
from bench.linear_policy_ref_stats import Form as PairForm
from bench.linear_policy_ref_stats import forward_truth as pair_forward_truth
from bench.linear_policy_ref_stats import hidden_gradient_truth as pair_hidden_truth
from bench.linear_policy_ref_stats import ours as our_pair
from bench.linear_policy_ref_stats import run_both as run_pair_both
from bench.linear_policy_ref_stats import run_forward as run_pair_forward
from bench.linear_policy_ref_stats import weight_gradient_truth as pair_weight_truth
from bench.linear_token_stats import (
    ONE_PASS,
    Form,
    forward_truth,
    hidden_gradient_truth,
    ours,
    run_both,
    run_forward,
    run_one_pass,
    weight_gradient_truth,
)
from bench.token_stats import BOTH, FORMS, LOGPROB, OUTPUTS

FUSED = f"{OURS}, fused"

# Logits that "keep" leaves beside all else have to fit.
KEPT_BYTES = 8 << 30


def linear_token_stats_passes(case: GpuCase, device: str) -> Iterator[Pass]:
    """Forward; forward and backward in each mode, the head frozen or trained."""
    rows, depth, vocab = case.shape
    work = BOTH if case.outputs == LINEAR_BOTH else LOGPROB
    hidden = (torch.randn(rows, depth, device=device) * (case.std / depth**0.5)).to(case.torch_dtype)
    weight = torch.randn(vocab, depth, device=device).to(case.torch_dtype)
    targets = make_targets(case, vocab, len(OUTPUTS[work]), device)
    others, missing = _rivals(work, targets, device, case.softcap)
    if device == "cpu" and case.outputs != FROZEN:
        missing[FUSED] = "its kernel takes a GPU"
    if case.outputs != FROZEN:  # the same forward pass
        mine = [(OURS, "auto"), *([] if FUSED in missing else [(FUSED, "fused")])]
        yield Pass(
            name=FORWARD,
            contenders=[
                *(
                    Contender(name=n, family=family, run=run_forward(form, hidden, weight, labels))
                    for n, family, form, labels in [
                        *((n, "ours", ours(work, mode, case.softcap), targets.labels) for n, mode in mine),
                        *others,
                    ]
                ),
                *product_ceilings(hidden, weight, gradients=0),
            ],
            bars=dict.fromkeys((n for n, _ in mine), RIVAL_BARS),
            truth=_forward_truth(hidden, weight, targets, work, case.softcap),
            tolerance=TOLERANCES[case.dtype],
            skipped=missing,
            flop=counted_flop(case, FORWARD),
            grad=False,
        )
    trained = case.outputs != FROZEN
    leaf, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
    leaves = [leaf, head] if trained else [leaf]
    runs: list[Contender] = []
    name = WITH_DX_DW if trained else WITH_DX
    modes = [mode for pass_name, mode in costs(case) if pass_name == name]
    for mode in modes:
        if f"{OURS}, {mode}" in missing:
            continue
        if mode == "keep" and 4 * rows * vocab > KEPT_BYTES:
            missing = {**missing, f"{OURS}, keep": f"keeps {4 * rows * vocab / 2**30:.0f} GiB of logits"}
            continue
        arguments = (leaf, head, targets.labels, targets.upstream, leaves)
        run = (
            run_one_pass(*arguments, softcap=case.softcap)
            if mode == ONE_PASS
            else run_both(ours(work, mode, case.softcap), *arguments)
        )
        runs.append(Contender(name=f"{OURS}, {mode}", family="ours", run=run))
    subjects = [run.name for run in runs]
    for n, family, form, labels in others:
        runs.append(Contender(name=n, family=family, run=run_both(form, leaf, head, labels, targets.upstream, leaves)))
    yield Pass(
        name=name,
        contenders=[*runs, *product_ceilings(hidden, weight, gradients=len(leaves))],
        bars=dict.fromkeys(subjects, RIVAL_BARS),
        truth=_gradient_truth(hidden, weight, targets, trained, case.softcap),
        tolerance=TOLERANCES[case.dtype],
        skipped=missing,
        flop=counted_flop(case, name),
    )


def _rivals(
    work: str, targets: Targets, device: str, softcap: float | None
) -> tuple[list[tuple[str, Family, Form, Tensor]], dict[str, str]]:
    name, statistics = list(FORMS[work].items())[-1]
    statistics = with_softcap(statistics, softcap)

    def whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return statistics(torch.nn.functional.linear(hidden, weight), labels)

    compiled = torch.compile(whole_logits, fullgraph=True, dynamic=False)
    forms: list[tuple[str, Family, Form, Tensor]] = [
        (f"eager, {name}", "eager", whole_logits, targets.plain),
        (f"torch.compile, {name}", "compile", compiled, targets.plain),
    ]
    find = _peers.linear_logprob_peers if work == LOGPROB else _peers.linear_logprob_entropy_peers
    peers, missing = find(device, softcap)
    # Cross entropies know labels to ignore; a log-prob with an entropy beside it does not.
    labels = targets.labels if work == LOGPROB else targets.plain
    forms += [(peer, "peer", form, labels) for peer, form in peers.items()]
    return forms, missing


def _forward_truth(
    hidden: Tensor, weight: Tensor, targets: Targets, work: str, softcap: float | None
) -> Sequence[Truth]:
    """Of 64 rows, spread over those that are kept: a product in float64 takes long."""
    rows = targets.kept[:: max(1, len(targets.kept) // 64)]
    exact = forward_truth(hidden[rows], weight, targets.plain[rows], OUTPUTS[work], softcap)
    return [Truth(name=t.name, value=t.value, select=rows) for t in exact]


def _gradient_truth(
    hidden: Tensor, weight: Tensor, targets: Targets, trained: bool, softcap: float | None
) -> list[Truth]:
    rows = edge_rows(len(hidden), hidden.device.type)
    upstream = tuple(g[rows] for g in targets.upstream)
    exact = hidden_gradient_truth(hidden[rows], weight, targets.labels[rows], upstream, softcap)
    truth = [Truth(name="dX", value=exact.value, select=rows)]
    if trained:
        kept = targets.kept
        upstream = tuple(g[kept] for g in targets.upstream)
        truth.append(weight_gradient_truth(hidden[kept], weight, targets.labels[kept], upstream, softcap))
    return truth


def linear_policy_ref_stats_passes(case: GpuCase, device: str) -> Iterator[Pass]:
    """Forward, and with dX and dW."""
    rows, depth, vocab = case.shape
    hidden = torch.randn(rows, depth, device=device) * (case.std / depth**0.5)
    ref_hidden = (hidden + 0.1 * torch.randn(rows, depth, device=device) * (case.std / depth**0.5)).to(case.torch_dtype)
    hidden, weight = hidden.to(case.torch_dtype), torch.randn(vocab, depth, device=device).to(case.torch_dtype)
    targets = make_targets(case, vocab, len(TRAINED), device)
    inputs = (hidden, weight, ref_hidden, weight.clone(), targets.plain)
    upstream = list(targets.upstream)
    compiled = torch.compile(by_log_softmax, fullgraph=True, dynamic=False)
    forms: list[tuple[str, Family, PairForm]] = [
        (OURS, "ours", our_pair),
        ("eager, log-softmax form", "eager", by_log_softmax),
        ("torch.compile, log-softmax form", "compile", compiled),
    ]
    some = torch.arange(0, rows, max(1, rows // 64), device=device)
    exact = pair_forward_truth(hidden[some], weight, ref_hidden[some], inputs[3], targets.plain[some])
    yield Pass(
        name=FORWARD,
        contenders=[
            *(Contender(name=n, family=family, run=run_pair_forward(form, inputs)) for n, family, form in forms),
            *product_ceilings(hidden, weight, gradients=0),
        ],
        bars={OURS: RIVAL_BARS},
        truth=[Truth(name=t.name, value=t.value, select=some) for t in exact],
        tolerance=1e-1,  # a divergence is a difference of logits that bfloat16 rounded
        flop=counted_flop(case, FORWARD),
        grad=False,
    )
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    arguments = (*leaves, *inputs[2:])
    yield Pass(
        name=WITH_DX_DW,
        contenders=[
            *(
                Contender(name=n, family=family, run=run_pair_both(form, arguments, upstream, leaves))
                for n, family, form in forms
            ),
            *product_ceilings(hidden, weight, gradients=2),
        ],
        bars={OURS: RIVAL_BARS},
        truth=[pair_hidden_truth(inputs, upstream), pair_weight_truth(inputs, upstream)],
        tolerance=1e-1,
        flop=counted_flop(case, WITH_DX_DW),
    )
