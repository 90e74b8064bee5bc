"""The reward's update on trajectories of hidden states that come from outside: `reward_update`, without a trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.rewards import BaseRewardModel
from irlfast.rollout import Rollouts

from .config import BiLevelConfig
from .experience import Experience, Scored
from .reward_update import RewardUpdate
from .trajectories import Trajectories


class IRLTrainer:
    """Trains a reward on trajectories of hidden states: one `step` is one optimiser step.

    Args:
        reward_model: any reward model on hidden states.
        config: `reward` (objective, options, optimiser) and `beta` are read.

    Raises:
        ValueError: a reward model that reads tokens.
    """

    def __init__(self, reward_model: BaseRewardModel, config: BiLevelConfig) -> None:
        if reward_model.reads != "hidden_states":
            raise ValueError(f"a {type(reward_model).__name__} reads tokens, not hidden states: use BiLevelTrainer")
        self.reward_model = reward_model
        self.update = RewardUpdate(reward_model, config)

    def step(
        self, experts: Trajectories, samples: Trajectories, log_proposal: Tensor | None = None
    ) -> dict[str, float]:
        """One optimiser step.

        Args:
            experts, samples: B demonstrations and K samples of the policy. Where both have groups, the demonstrations
                of a prompt are set against that prompt's samples alone; otherwise all against all, as of one prompt.
            log_proposal: [K] log-probs of the samples under the sampler that drew them, which importance weights need.

        Returns:
            loss and the objective's metrics, as the trainer logs them.

        Raises:
            ValueError: an objective that needs what was not given: log_proposal, or log-probs under the policy.
        """
        needs = self.update.objective.needs
        known = {"log_proposal": log_proposal is not None, "log_base": True, "expert_log_base": True}
        known["sample_logprobs"] = log_proposal is not None
        missing = sorted(name for name in needs if not known.get(name, False))
        if missing:
            raise ValueError(
                f"objective {type(self.update.objective).__name__} needs {', '.join(missing)}: give the rollouts' "
                "log_probs, choose an objective without (gail, weighted), or let BiLevelTrainer train the policy too"
            )
        grouped = experts.groups is not None and samples.groups is not None
        given = torch.zeros(len(samples)) if log_proposal is None else log_proposal.detach().float()
        # A response's whole log-prob stands at its first token: the steps look at sums alone.
        first = samples.mask & (samples.mask.cumsum(1) == 1)
        logprobs = torch.where(first, given.to(first.device)[:, None], 0.0)
        rollouts = Rollouts(
            **_fields(samples, grouped),
            sampler_logprobs=logprobs,
            model_logprobs=logprobs,
            finish_reasons=("stop",) * len(samples),
        )
        expert_rows = Rollouts(
            **_fields(experts, grouped),
            sampler_logprobs=torch.zeros(experts.mask.shape, device=experts.mask.device),
            model_logprobs=torch.zeros(experts.mask.shape, device=experts.mask.device),
            finish_reasons=("stop",) * len(experts),
        )
        experience = Experience(experts=expert_rows, samples=rollouts, scored=_scored(samples))
        return self.update.step(experience, _scored(experts))


def _fields(rows: Trajectories, grouped: bool) -> dict[str, Tensor]:
    groups = rows.groups if grouped else None
    return {
        "input_ids": rows.actions,
        "attention_mask": rows.mask,
        "response_mask": rows.mask,
        "groups": torch.zeros(len(rows), dtype=torch.int64, device=rows.mask.device) if groups is None else groups,
    }


def _scored(rows: Trajectories) -> Scored:
    zeros = torch.zeros(rows.mask.shape, device=rows.mask.device)
    return Scored(inputs=(rows.hidden_states, rows.mask, rows.mask), log_base=zeros.sum(1), base_logprobs=zeros)
