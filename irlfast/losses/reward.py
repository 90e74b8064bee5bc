"""Maximum-entropy inverse RL (guided cost learning): the likelihood of demonstrations under p ~ b exp(r / beta).

    L = mean_i [ -r(x_i, y_i) / beta + log Z_hat(x_i) ]         over demonstrations (x_i, y_i)
    log Z_hat(x) = logsumexp_k l_k - log K,    l_k = r(x, y_k) / beta + log b_k - log q_k

over the K samples y_k ~ q of that same prompt x, for Z depends on the prompt (Ziebart et al. 2008; Finn, Levine and
Abbeel, "Guided Cost Learning", 2016, equation 4, with the samples' weights normalised). Its gradient is the mean of r'
under the self-normalised importance weights minus its mean over demonstrations.

Rewards come in raw. Normalising them in here would make the loss blind to the scale that it is there to learn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.losses._rewards import check_beside, check_rewards, prompts_of, reward_summary
from irlfast.ops import importance_weights
from irlfast.ops._segments import Groups, compute_dtype


class RewardLoss(NamedTuple):
    """loss: 0-d, to minimise. metrics: detached 0-d tensors by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def maxent_irl_loss(
    expert_rewards: Tensor,  # (E)
    sample_rewards: Tensor,  # (K)
    log_proposal: Tensor,  # (K)
    *,
    log_base: Tensor | None = None,  # (K)
    expert_groups: Tensor | None = None,  # (E)
    sample_groups: Tensor | None = None,  # (K)
    beta: float = 1.0,
    clip: float | tuple[float, float] | None = None,
    temper: float = 1.0,
    centre: float = 0.0,
    label_smoothing: float = 0.0,
    expert_log_proposal: Tensor | None = None,  # (E)
    expert_log_base: Tensor | None = None,  # (E)
) -> RewardLoss:
    """Negative log-likelihood of demonstrations under the reward, per demonstration, in nats.

    Adding a constant to every reward of a prompt changes neither loss nor gradient (centre = 0): the reward is learned
    up to that. With log_base the constant log b of the demonstrations, which no reward can change, is left out.

    Args:
        expert_rewards: [E] raw rewards of the demonstrations.
        sample_rewards: [K] raw rewards of the policy's samples.
        log_proposal: [K] log q of the samples under the sampler that drew them, with its temperature, top-p and top-k.
        log_base: [K] log b of the samples, as of a reference policy; None is b = 1.
        expert_groups, sample_groups: [E] and [K] integer prompt ids, in any order; both or neither. Without them all
            rows belong to one prompt. Samples of a prompt without a demonstration take no part in the loss.
        beta: temperature of the reward, positive.
        clip, temper: as in `ops.importance_weights`. Where either is given, the loss keeps its value and its GRADIENT
            takes the clipped and tempered weights in place of the plain ones; it is then a surrogate whose value no
            longer is the integral of its gradient.
        centre: c >= 0 of the penalty c (E_expert[r^2] + E_sample[r^2]) / 2, which settles the free constant. It is not
            shift-invariant, by intent.
        label_smoothing: e of the target (1 - e) demonstration + e (its prompt's samples, each alike): -r(x, y_E)
            becomes -(1 - e) r(x, y_E) - e mean_k r(x, y_k). The reward that is learned lies between p_E's and the
            sampler's.
        expert_log_proposal: [E]; where given, demonstrations join their prompt's samples in Z_hat. log_proposal and
            this must then both hold the log-density of the mixture the union comes from,
            log sum_j f_j q_j with f_j the share of rows drawn from q_j, the demonstrations' own density being one of
            the q_j. Any other density biases Z.
        expert_log_base: [E] log b of the demonstrations, needed where both expert_log_proposal and log_base are given.

    Returns:
        RewardLoss(loss, metrics). Gradients pass to the rewards alone. Metrics: expert_reward, sample_reward (means),
        margin (their difference), auc (chance that a demonstration's reward exceeds that of a sample of its prompt,
        ties half), log_normalizer, ess, ess_relative (ess over the prompt's number of samples; these three averaged
        over demonstrations), max_abs_reward.

    Raises:
        TypeError: a tensor that is not floating point, or group ids that are not integers.
        ValueError: shapes that do not fit, nothing to learn from, a bad beta, clip, temper, centre or label_smoothing,
            a demonstration whose prompt has no samples, or (on the CPU) rewards or log weights that are not finite.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; expected a positive temperature of the reward")
    if not 0 <= centre < float("inf"):
        raise ValueError(f"centre is {centre}; expected a penalty coefficient of at least 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a share in [0, 0.5)")
    _check_vectors(expert_rewards, sample_rewards, log_proposal, log_base, expert_log_proposal, expert_log_base)
    prompts, expert_index = prompts_of(expert_rewards, sample_rewards, expert_groups, sample_groups)

    dtype = compute_dtype(expert_rewards, sample_rewards)
    expert_rewards, sample_rewards = expert_rewards.to(dtype), sample_rewards.to(dtype)
    log_target = sample_rewards / beta
    if log_base is not None:
        log_target = log_target + log_base.detach()
    negatives, negative_index = log_proposal.detach(), prompts.index
    if expert_log_proposal is not None:
        expert_log_target = expert_rewards / beta
        if expert_log_base is not None:
            expert_log_target = expert_log_target + expert_log_base.detach()
        log_target = torch.cat([log_target, expert_log_target])
        negatives = torch.cat([negatives, expert_log_proposal.detach()])
        negative_index = torch.cat([negative_index, expert_index])

    weights, log_normalizer, ess = importance_weights(
        log_target, negatives, groups=negative_index, clip=clip, temper=temper, differentiable=True
    )
    by_prompt = Groups(negative_index)
    if clip is not None or temper != 1.0:
        # Worth zero; its gradient is that of the chosen weights.
        surrogate = by_prompt.sum(weights.detach() * (log_target - log_target.detach()))
        log_normalizer = log_normalizer.detach() + surrogate.to(dtype)
    target = expert_rewards
    if label_smoothing:
        others = prompts.mean(sample_rewards)[expert_index].to(dtype)
        target = (1 - label_smoothing) * expert_rewards + label_smoothing * others
    loss = (log_normalizer[expert_index] - target / beta).mean()
    if centre:
        loss = loss + centre * (expert_rewards.square().mean() + sample_rewards.square().mean()) / 2

    expert, sample = expert_rewards.detach(), sample_rewards.detach()
    metrics = {
        **reward_summary(expert, sample, expert_index, prompts),
        "log_normalizer": log_normalizer.detach()[expert_index].mean(),
        "ess": ess.detach()[expert_index].mean(),
        "ess_relative": (ess.detach() / by_prompt.counts)[expert_index].mean(),
    }
    return RewardLoss(loss, metrics)


def _check_vectors(
    expert_rewards: Tensor,
    sample_rewards: Tensor,
    log_proposal: Tensor,
    log_base: Tensor | None,
    expert_log_proposal: Tensor | None,
    expert_log_base: Tensor | None,
) -> None:
    check_rewards(expert_rewards=expert_rewards, sample_rewards=sample_rewards)
    check_beside("log_proposal", log_proposal, "sample_rewards", sample_rewards)
    check_beside("log_base", log_base, "sample_rewards", sample_rewards)
    check_beside("expert_log_proposal", expert_log_proposal, "expert_rewards", expert_rewards)
    check_beside("expert_log_base", expert_log_base, "expert_rewards", expert_rewards)
    if expert_log_proposal is None and expert_log_base is not None:
        raise ValueError("expert_log_base is used only with expert_log_proposal; give both, or leave it out")
    if expert_log_proposal is not None and (log_base is None) != (expert_log_base is None):
        raise ValueError("with expert_log_proposal, give both log_base and expert_log_base, or neither")
