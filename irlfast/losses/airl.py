"""Adversarial inverse RL (Fu, Luo and Levine 2018, arXiv 1710.11248): GAIL's classifier with the policy in its logit.

    sequence form   z(x, y) = f(x, y) - log pi(y|x)                     per response
    token form      z_t = g_t + gamma h(s_{t+1}) - h(s_t) - log pi_t    per token (equation 4 of the paper)

with s_t the prompt and the tokens before token t, h = 0 after the last one. pi is the density of the policy that drew
the samples, so at its optimum f = log p_E: the reward up to log Z, which no longer moves with the policy. That is what
subtracting log pi is for; without it the optimum is GAIL's log p_E - log pi. What is kept is f (or the tokens' g): the
shaping potential h takes up what depends on the dynamics and is thrown away.

The token form compares how often (state, token) is met, so away from equilibrium its logit also takes up
log (rho_E(s) / rho_pi(s)), how much more often one side meets the state; the sequence form has no such term.

For a model p_E = b exp(f / beta) / Z with a base b and a temperature, the logit is f / beta + log b - log pi.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._rewards import check_beside, check_option, check_rewards, prompts_of, reward_summary
from .discriminator import check_smoothing, discriminator_loss
from .objective import Objective, RewardBatch, TokenTerms
from .reward import RewardLoss


def airl_loss(
    expert_rewards: Tensor,  # (E)
    sample_rewards: Tensor,  # (K)
    expert_logprobs: Tensor,  # (E)
    sample_logprobs: Tensor,  # (K)
    *,
    label_smoothing: float = 0.0,
    expert_groups: Tensor | None = None,
    sample_groups: Tensor | None = None,
) -> RewardLoss:
    """Logistic loss on the logit f - log pi, in its sequence form.

    Args:
        expert_rewards, sample_rewards: [E] and [K] f of demonstrations and samples; a level must be learnable (a bias),
            for the optimum is f = log p_E, log Z included.
        expert_logprobs, sample_logprobs: [E] and [K] log pi(y|x), EOS included, under the policy that drew the samples;
            no gradient passes to them. With a base, log pi - log b.
        label_smoothing: labels are 1 - e and e.
        expert_groups, sample_groups: prompt ids, for the metric auc alone; both or neither.

    Returns:
        RewardLoss(loss, metrics): expert_reward, sample_reward, margin, auc, max_abs_reward (all of f),
        expert_accuracy, sample_accuracy (of the logit), expert_logprob, sample_logprob (means of what was subtracted).

    Raises:
        TypeError, ValueError: shapes or values that do not fit.
    """
    check_rewards(expert_rewards=expert_rewards, sample_rewards=sample_rewards)
    check_beside("expert_logprobs", expert_logprobs, "expert_rewards", expert_rewards)
    check_beside("sample_logprobs", sample_logprobs, "sample_rewards", sample_rewards)
    expert_logprobs, sample_logprobs = expert_logprobs.detach(), sample_logprobs.detach()
    prompts, index = prompts_of(expert_rewards, sample_rewards, expert_groups, sample_groups)
    loss, accuracies = discriminator_loss(
        expert_rewards - expert_logprobs, sample_rewards - sample_logprobs, label_smoothing=label_smoothing
    )
    metrics = {
        **reward_summary(expert_rewards.detach(), sample_rewards.detach(), index, prompts),
        **accuracies,
        "expert_logprob": expert_logprobs.mean(),
        "sample_logprob": sample_logprobs.mean(),
    }
    return RewardLoss(loss, metrics)


def shaped_token_rewards(tokens: TokenTerms, gamma: float) -> Tensor:
    """g_t + gamma h(s_{t+1}) - h(s_t) at the response's tokens, 0 elsewhere: [B, S]."""
    shaped = tokens.rewards
    if tokens.potentials is not None:
        potentials = torch.where(tokens.mask, tokens.potentials, 0.0)
        # A response is adjacent: what follows its last token is outside the mask, where the potential is 0.
        following = torch.nn.functional.pad(potentials[:, 1:], (0, 1))
        shaped = shaped + gamma * following - potentials
    return torch.where(tokens.mask, shaped, 0.0)


def airl_token_loss(
    expert: TokenTerms, sample: TokenTerms, *, gamma: float = 1.0, label_smoothing: float = 0.0
) -> RewardLoss:
    """Logistic loss on the logit of every response token; each side's tokens weigh the same.

    With a base, give log pi_t - log b_t as the tokens' log-probs.

    Args:
        expert, sample: TokenTerms [E, S] and [K, S'] of demonstrations and samples.
        gamma: discount of the shaping potential.
        label_smoothing: labels are 1 - e and e.

    Returns:
        RewardLoss(loss, metrics): expert_accuracy, sample_accuracy over tokens. Rewards get their gradient through g
        and h, log-probs none; positions outside the masks are not read.

    Raises:
        ValueError: a side without a token, shapes that disagree, or (on the CPU) a logit that is not finite.
    """
    logits = []
    for name, tokens in (("expert", expert), ("sample", sample)):
        for part in ("mask", "logprobs", "potentials"):
            values = getattr(tokens, part)
            if values is not None and values.shape != tokens.rewards.shape:
                raise ValueError(
                    f"{name} tokens: {part} has shape {tuple(values.shape)}; expected that of rewards, "
                    f"{tuple(tokens.rewards.shape)}"
                )
        mask = tokens.mask.bool()
        z = (shaped_token_rewards(tokens, gamma) - torch.where(mask, tokens.logprobs.detach(), 0.0))[mask]
        check_rewards(**{f"{name}_token_logits": z})
        logits.append(z)
    loss, metrics = discriminator_loss(*logits, label_smoothing=label_smoothing)
    return RewardLoss(loss, metrics)


@dataclass(frozen=True, kw_only=True)
class AirlObjective(Objective):
    """AIRL: `losses.airl_loss`, or `losses.airl_token_loss`. The policy is trained on f, its entropy (or KL) beside it.

    Args:
        form: "sequence", or "token", which needs a reward model with rewards a token.
        gamma: discount of the shaping potential, token form.
        label_smoothing: labels are 1 - e and e.
    """

    form: Literal["sequence", "token"] = "sequence"
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_option(self.form in ("sequence", "token"), "form", self.form, "'sequence' or 'token'")
        check_option(0 <= self.gamma <= 1, "gamma", self.gamma, "a discount in [0, 1]")
        check_smoothing(self.label_smoothing)

    @property
    def needs(self) -> frozenset[str]:
        if self.form == "token":
            return frozenset({"expert_tokens", "sample_tokens"})
        return frozenset({"expert_logprobs", "sample_logprobs", "expert_log_base", "log_base"})

    def loss(self, batch: RewardBatch) -> RewardLoss:
        if self.form == "token":
            return self._token_loss(batch)
        expert, sample = batch.require("expert_logprobs", "airl"), batch.require("sample_logprobs", "airl")
        if batch.log_base is not None:
            expert = expert - batch.require("expert_log_base", "airl with log_base")
            sample = sample - batch.log_base
        result = airl_loss(
            batch.expert_rewards / batch.beta,
            batch.sample_rewards / batch.beta,
            expert,
            sample,
            label_smoothing=self.label_smoothing,
            expert_groups=batch.expert_groups,
            sample_groups=batch.sample_groups,
        )
        return RewardLoss(result.loss, {**result.metrics, **batch.summary()})

    def _token_loss(self, batch: RewardBatch) -> RewardLoss:
        if batch.expert_tokens is None or batch.sample_tokens is None:
            raise ValueError("airl with form='token' needs expert_tokens and sample_tokens: give them to RewardBatch")
        result = airl_token_loss(
            batch.expert_tokens, batch.sample_tokens, gamma=self.gamma, label_smoothing=self.label_smoothing
        )
        return RewardLoss(result.loss, {**batch.summary(), **result.metrics})
