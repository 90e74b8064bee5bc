"""losses.gae, beside the usual loop over time: one step of vectors over the batch for each token, last to first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._case import OURS, Case, Contender, Family, Pass, Truth
from irlfast.ops import gae
from irlfast.ops.gae import gae_reference

Outputs = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor, Tensor], Outputs]

GAMMA, LAM = 0.99, 0.95
SHAPES = ((64, 128), (64, 512))
CASES = tuple(Case(op="gae", line="E", work="advantages and returns", shape=shape, dtype="float32") for shape in SHAPES)


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    """Right for masks that end a sequence, which is what it is measured on; ours also passes over holes."""
    rewards, values = rewards * mask, values * mask
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    backwards = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        next_value = values[:, t]
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    return gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


def passes(case: Case) -> Iterator[Pass]:
    """Lengths are uniform in [1, T]. torch.compile unrolls the loop, which takes minutes at 512: left out there."""
    batch, length = case.shape
    rewards, values = torch.randn(batch, length), torch.randn(batch, length)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).float()
    forms: list[tuple[str, Family, Form]] = [(OURS, "ours", ours), ("loop over time", "eager", loop)]
    skipped = {}
    if length <= 128:
        forms.append(("torch.compile", "compile", torch.compile(loop, fullgraph=True, dynamic=False)))
    else:
        skipped["torch.compile"] = "unrolls the loop over time; compiling that takes minutes"
    exact = gae_reference(rewards.double(), values.double(), mask, gamma=GAMMA, lam=LAM)
    yield Pass(
        name="forward",
        contenders=[
            Contender(name=name, family=family, run=_forward(form, rewards, values, mask))
            for name, family, form in forms
        ],
        bars={OURS: ()},
        truth=[Truth(name=name, value=value) for name, value in exact._asdict().items()],
        tolerance=1e-4,
        nbytes=5 * rewards.nbytes,
        skipped=skipped,
        grad=False,
    )


def _forward(form: Form, rewards: Tensor, values: Tensor, mask: Tensor) -> Callable[[], Outputs]:
    return lambda: form(rewards, values, mask)
