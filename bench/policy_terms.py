"""losses.policy_loss, forward and backward: line E. Everybody also computes the metrics that a trainer logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from irlfast.losses import policy_loss

Form = Callable[[Tensor], tuple[Tensor, ...]]

TESTS = "tests/losses/test_policy_loss.py"
PPO, WITH_KL = "PPO", "PPO with k3"
CASES = tuple(Case(op="policy_terms", line="E", work=work, shape=(64, 512), dtype="float32") for work in (PPO, WITH_KL))
BARS = (Bar(kind="speedup", against="eager", limit=7), Bar(kind="speedup", against="compile", limit=2))
METRICS = ("approx_kl", "clip_fraction", "ratio_max")
CLIP, KL_COEF = 0.2, 0.1


def ppo(logprobs: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The loss, then METRICS. A mean over unmasked tokens; the KL estimate is corrected by the ratio."""
    count = mask.sum()
    log_ratio = (logprobs - old) * mask
    ratio = log_ratio.exp()
    plain, clipped = -ratio * advantages[:, None], -ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, None]
    terms = torch.maximum(plain, clipped)
    if ref is not None:
        difference = (logprobs - ref) * mask
        terms = terms + KL_COEF * ratio * ((-difference).exp() - 1 + difference)
    loss = (terms * mask).sum() / count
    with torch.no_grad():
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum() / count
        clip_fraction = ((clipped > plain) * mask).sum() / count
        ratio_max = ratio.masked_fill(mask == 0, -torch.inf).max()
    return loss, approx_kl, clip_fraction, ratio_max


def ours(logprobs: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    loss, metrics = policy_loss(
        logprobs,
        advantages,
        mask,
        kind="ppo",
        old_logprobs=old,
        ref_logprobs=ref,
        clip=(CLIP, CLIP),
        kl_coef=0.0 if ref is None else KL_COEF,
        kl_estimator="k3",
    )
    return loss, *(metrics[name] for name in METRICS)


def passes(case: Case) -> Iterator[Pass]:
    """Forward + backward. Lengths are uniform in [1, T], ratios spread by about a tenth around 1."""
    batch, length = case.shape
    logprobs = -2 * torch.rand(batch, length)
    old = logprobs + 0.1 * torch.randn(batch, length)
    ref = logprobs + 0.3 * torch.randn(batch, length) if case.work == WITH_KL else None
    advantages = torch.randn(batch)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).float()
    rest = (old, ref, advantages, mask)
    leaf, exact_leaf = logprobs.requires_grad_(), logprobs.detach().double().requires_grad_()
    exact = with_gradient(ppo, exact_leaf, [None if x is None else x.double() for x in rest])()
    forms: list[tuple[str, Family, Callable[..., tuple[Tensor, ...]]]] = [
        (OURS, "ours", ours),
        ("eager", "eager", ppo),
        ("torch.compile", "compile", torch.compile(ppo, fullgraph=True, dynamic=False)),
    ]
    yield Pass(
        name="forward + backward",
        contenders=[
            Contender(name=name, family=family, run=with_gradient(form, leaf, rest)) for name, family, form in forms
        ],
        bars={OURS: BARS},
        truth=[
            Truth(name=name, value=value.detach())
            for name, value in zip(("loss", *METRICS, "gradient"), exact, strict=True)
        ],
        tolerance=1e-3,
        nbytes=leaf.nbytes * (5 if ref is None else 6),
    )


def with_gradient(
    form: Callable[..., tuple[Tensor, ...]], leaf: Tensor, rest: Sequence[Tensor | None]
) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        values = form(leaf, *rest)
        return *values, *torch.autograd.grad(values[0], leaf)

    return run
