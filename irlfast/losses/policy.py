"""Policy-gradient losses on the log-probabilities of sampled tokens: recipes over `ops.policy_terms`.

A kind is a term, the clip range and the aggregation of its paper. It does NOT compute advantages: they come in ready,
`losses.group_advantages(rewards, groups, kind=...)` or `losses.gae` makes them. With rho_t = exp(logp_t - old_logp_t),
A the advantage and m the response mask, the term of token t is

    reinforce   -A_t logp_t                                              one advantage a response, or one a token
    token       -A_t logp_t                                              one advantage a token
    rloo        -A_t logp_t, A of group_advantages(kind="rloo")          Kool et al. 2019; Ahmadian et al. 2024
    ppo         -min(rho_t A_t, clip(rho_t, 1 - lo, 1 + hi) A_t)         Schulman et al. 2017
                and, with dual_clip = c, at most -c A_t where A_t < 0:  min(-c A_t, that), Ye et al. 2020
    grpo        ppo, A of group_advantages(kind="grpo")                  Shao et al. 2024
    dr_grpo     ppo, A of group_advantages(kind="dr_grpo")               Liu et al. 2025
    dapo        ppo, A as for grpo; responses without an advantage are   Yu et al. 2025
                left out whole
    gspo        ppo with rho = exp(mean_t (logp_t - old_logp_t)), one a  Zheng et al. 2025
                response, the gradient going through the mean
    cispo       -stopgrad(min(rho_t, 1 + hi)) A_t logp_t                 MiniMax-M1, 2025

and, where clip or aggregation is not given, it is

    kind                                clip              aggregation
    reinforce, token, ppo, cispo        (0.2, 0.2)        token_mean
    rloo                                                  seq_mean_token_sum
    grpo                                (0.2, 0.2)        seq_mean_token_mean
    dr_grpo                             (0.2, 0.2)        token_sum, over `denominator`, which it then needs
    dapo                                (0.2, 0.28)       token_mean
    gspo                                (3e-4, 4e-4)      seq_mean_token_mean

The samplers' own log-probabilities, where given, correct for sampling from a policy other than the old one. A KL
penalty and an entropy bonus are added token by token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from irlfast.losses.aggregation import Aggregation
from irlfast.ops._segments import Groups, Sequences
from irlfast.ops.policy_terms import METRICS, policy_terms

PolicyKind = Literal["reinforce", "token", "ppo", "grpo", "dr_grpo", "rloo", "gspo", "dapo", "cispo"]
POLICY_KINDS: tuple[str, ...] = get_args(PolicyKind)


class PolicyMetrics(Mapping[str, Tensor]):
    """Detached 0-d tensors by name, all of them places of one tensor: one is taken out when it is asked for."""

    __slots__ = ("_places", "_values")

    def __init__(self, values: Tensor, places: Mapping[str, int]) -> None:
        self._values, self._places = values, places

    def __getitem__(self, name: str) -> Tensor:
        return self._values[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"PolicyMetrics({self.floats()})"

    def floats(self) -> dict[str, float]:
        """All of them as numbers. On a GPU that waits for it once, not once for each."""
        values = self._values.tolist()
        return {name: values[place] for name, place in self._places.items()}


class PolicyLoss(NamedTuple):
    """loss: 0-d, to minimise. metrics: detached 0-d tensors by name; `metrics.floats()` has them as numbers."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


class _Recipe(NamedTuple):
    term: Literal["reinforce", "ppo", "gspo", "cispo"]
    clip: tuple[float, float] = (0.2, 0.2)
    aggregation: Aggregation = "token_mean"


_RECIPES: dict[str, _Recipe] = {
    "reinforce": _Recipe("reinforce"),
    "token": _Recipe("reinforce"),
    "ppo": _Recipe("ppo"),
    "grpo": _Recipe("ppo", aggregation="seq_mean_token_mean"),
    "dr_grpo": _Recipe("ppo", aggregation="token_sum"),
    "rloo": _Recipe("reinforce", aggregation="seq_mean_token_sum"),
    "gspo": _Recipe("gspo", clip=(3e-4, 4e-4), aggregation="seq_mean_token_mean"),
    "dapo": _Recipe("ppo", clip=(0.2, 0.28)),
    "cispo": _Recipe("cispo"),
}


def policy_loss(
    logprobs: Tensor,  # (B, T), or packed (N)
    advantages: Tensor,  # (B), or shaped as logprobs
    mask: Tensor | None = None,  # shaped as logprobs, as all that follow
    *,
    kind: PolicyKind,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k2",
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
    icepop_band: tuple[float, float] | None = None,
    tis_level: Literal["token", "sequence"] = "token",
    aggregation: Aggregation | None = None,
    denominator: float | Tensor | None = None,
    groups: Tensor | None = None,  # (B)
    cu_seqlens: Tensor | None = None,  # (B + 1)
    impl: str = "auto",
) -> PolicyLoss:
    """Loss whose gradient step raises the likelihood of tokens with a positive advantage.

    Gradients pass to logprobs and entropy alone. What stands outside the mask, NaN and infinities included, has no
    influence and receives gradient 0; a batch without a single unmasked token has loss 0.

    Args:
        logprobs: [B, T] log pi of the tokens under the policy being trained; or [N], packed, with `cu_seqlens`.
        advantages: [B], one a response, or one a token. Packed advantages with N = B are taken as one a response.
        mask: non-zero on response tokens, EOS included; None counts all.
        kind: see the module's table.
        old_logprobs: log-probs under the policy that the step started from. Kinds with a ratio need them; elsewhere
            they stand for the current ones (detached) where they are missing.
        ref_logprobs: under the reference policy; the KL is reported, and with kl_coef a part of the loss.
        rollout_logprobs: as the sampler reported them; the gap is reported, and with tis_cap or icepop_band corrected
            for.
        entropy: entropy of the policy at each token; reported, and with entropy_coef a bonus.
        clip: (lo, hi), the ratio's range [1 - lo, 1 + hi]; of "cispo" hi alone. None takes the kind's.
        dual_clip: c > 1, the bound on a negative advantage's loss in kinds on ppo's term and gspo; None for none.
        kl_coef: weight of the KL penalty.
        kl_estimator: "k2", whose gradient on samples of the policy is that of the reverse KL, or "k3", here times the
            differentiable ratio, which has the same (without it, it would be the forward KL's). "k1" has expected
            gradient 0 and is refused as a loss term: put it in the reward instead. It may be reported.
        entropy_coef: weight of the entropy bonus. A batch mean of -logp is no entropy to differentiate: its expected
            gradient is 0, as k1's. Give the exact entropy of each next-token distribution.
        tis_cap: C > 0; each policy term is multiplied by min(r, C), r = exp(old_logprobs - rollout_logprobs)
            (truncated importance sampling, Yao et al. 2025). KL and entropy terms are not.
        icepop_band: (low, high); each policy term is multiplied by r, and by 0 where r lies outside (Ling team 2025,
            IcePop). With tis_cap too, by min(r, C) inside the band.
        tis_level: whether r is each token's, or the product over its response.
        aggregation: see `irlfast.losses.aggregation`; None takes the kind's.
        denominator: the global count, over all ranks and micro-batches, or the constant to divide by.
        groups: [B] integer prompt ids, for "dapo" alone: a prompt is left out, tokens and counts, where all its
            advantages are 0. Without them each response with advantage 0 is, which also drops one that happens to hit
            its group's mean. A global denominator counts what is left in: the metrics tokens or sequences, summed.
        cu_seqlens: [B + 1] integer offsets; response i is logprobs[cu_seqlens[i]:cu_seqlens[i + 1]].
        impl: "auto", "reference", "cpu", "cuda" or "triton", as in `ops.policy_terms`.

    Returns:
        PolicyLoss(loss, metrics) in float32 (float64 where an input is). Metrics are means over this batch's unmasked
        tokens unless it says otherwise.

        always: policy (the aggregated first term), tokens and sequences (how many take part).
        with old_logprobs: approx_kl (k3 of old to new); ratio_mean, ratio_min, ratio_max; ess, the effective sample
            size of the ratios as a share, (sum rho)^2 / (n sum rho^2), 1 where they are all equal. Of gspo the ratios
            are those of the responses.
        kinds that clip: clip_fraction (tokens whose gradient the clip stopped; of cispo, whose ratio it cut), and its
            two parts clip_fraction_low (ratio below 1) and clip_fraction_high.
        with ref_logprobs: kl, by kl_estimator. With entropy: entropy.
        with rollout_logprobs: rollout_gap, rollout_gap_max (mean and largest |old - rollout|), rollout_kl (k3 of the
            sampler to old); with tis_cap tis_fraction (tokens capped), with icepop_band icepop_fraction (zeroed).

    Raises:
        TypeError: a tensor that is not floating point, or not of integers where ids or offsets are meant.
        ValueError: shapes or devices that do not fit, an input that the chosen kind or coefficient needs and did not
            get, or an option outside its range.
        RuntimeError: an `impl` that is not available here.
    """
    if kind not in _RECIPES:
        raise ValueError(f"kind is {kind!r}; this version has {POLICY_KINDS}")
    term, default_clip, default_aggregation = _RECIPES[kind]
    if term != "reinforce" and old_logprobs is None:
        raise ValueError(f"kind {kind!r} needs old_logprobs, which was not given")
    if kind == "token" and advantages.shape != logprobs.shape:
        raise ValueError(
            f"kind 'token' takes advantages [B, T], one a token; these have shape {tuple(advantages.shape)} for "
            f"logprobs {tuple(logprobs.shape)}; for one a response use 'reinforce'"
        )
    if dual_clip is not None and not (term in ("ppo", "gspo") and dual_clip > 1):
        raise ValueError(f"dual_clip is {dual_clip} with kind {kind!r}; expected more than 1, with a kind that clips")
    if kind == "dr_grpo" and aggregation is None and denominator is None:
        raise ValueError(
            "kind 'dr_grpo' divides by a constant: give denominator, such as responses * longest length allowed, or "
            "another aggregation"
        )
    if groups is not None and kind != "dapo":
        raise ValueError(f"groups is given with kind {kind!r}; only 'dapo' looks at them")
    loss, values = policy_terms(
        logprobs,
        advantages,
        mask,
        cu_seqlens=cu_seqlens,
        term=term,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        entropy=entropy,
        clip=default_clip if clip is None else clip,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        tis_cap=tis_cap,
        icepop_band=icepop_band,
        correction_level=tis_level,
        aggregation=default_aggregation if aggregation is None else aggregation,
        denominator=denominator,
        keep=_informative(advantages, mask, groups, cu_seqlens) if kind == "dapo" else None,
        impl=impl,
    )
    reported = _reported(
        old_logprobs is not None,
        term != "reinforce",
        ref_logprobs is not None,
        entropy is not None,
        rollout_logprobs is not None,
        tis_cap is not None,
        icepop_band is not None,
    )
    if torch.compiler.is_compiling():  # what it traces returns tensors in dicts, and no objects of ours
        return PolicyLoss(loss, {name: values[place] for name, place in reported.items()})
    return PolicyLoss(loss, PolicyMetrics(values, reported))


@functools.cache
def _reported(
    old: bool, clips: bool, ref: bool, entropy: bool, rollout: bool, tis: bool, icepop: bool
) -> Mapping[str, int]:
    """The metrics that their inputs are there for, with their places."""
    there = {
        "clip_fraction": clips,
        "clip_fraction_low": clips,
        "clip_fraction_high": clips,
        "kl": ref,
        "entropy": entropy,
        "tis_fraction": tis,
        "icepop_fraction": icepop,
    }
    there |= dict.fromkeys(("approx_kl", "ratio_mean", "ratio_min", "ratio_max", "ess"), old)
    there |= dict.fromkeys(("rollout_gap", "rollout_gap_max", "rollout_kl"), rollout)
    return {name: i for i, name in enumerate(METRICS) if there.get(name, True)}


def _informative(advantages: Tensor, mask: Tensor | None, groups: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B] bool: the responses, or all of a prompt's, with an advantage that is not 0."""
    tells = advantages != 0
    per_token = advantages.ndim == 2 if cu_seqlens is None else advantages.shape[0] != cu_seqlens.shape[0] - 1
    if per_token:
        if mask is not None:
            tells = tells & mask.bool()
        tells = Sequences(advantages, cu_seqlens).sum(tells) > 0
    if groups is None:
        return tells
    by_prompt = Groups.of(groups, tells)
    return (by_prompt.sum(tells) > 0)[by_prompt.index]
