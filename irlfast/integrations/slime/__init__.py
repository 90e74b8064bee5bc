"""irlfast in slime: functions for its plug-in points, named by their paths on its command line (docs/slime.md).

    reward, group_reward    --custom-rm-path: a learned reward, saved, or learning as slime trains
    generate_rollout        --rollout-function-path: slime's rollouts, after which that reward learns
    rescore, reload_reward  for a rollout function of your own, after a reward has changed
    post                    --custom-reward-post-process-path: advantages within groups
    loss                    --custom-loss-function-path: slime's policy loss, on fused ops
    tis, icepop             --custom-tis-function-path: corrections for the sampler's mismatch

Beside them stand the functions of bi-level IRL around a policy trainer (docs/bilevel_names.md), of which
generate_rollouts_with_sglang samples.
"""

from irlfast.train import (
    BiLevelOptimizer,
    BiLevelTrainingLoop,
    integrate_with_rollout,
    load_expert_demonstrations,
    setup_bi_level_irl,
)

from .advantages import post
from .loss import loss
from .online import generate_rollout
from .reward import group_reward, reload_reward, rescore, reward
from .rollouts import generate_rollouts_with_sglang
from .tis import icepop, tis

__all__ = [
    "BiLevelOptimizer",
    "BiLevelTrainingLoop",
    "generate_rollout",
    "generate_rollouts_with_sglang",
    "group_reward",
    "icepop",
    "integrate_with_rollout",
    "load_expert_demonstrations",
    "loss",
    "post",
    "reload_reward",
    "rescore",
    "reward",
    "setup_bi_level_irl",
    "tis",
]
