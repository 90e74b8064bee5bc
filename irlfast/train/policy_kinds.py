"""The policy updates a trainer offers, one row each: a loss of `losses.policy_loss` and what it is fed with.

    kind        loss's term       advantage of a response   aggregation             old log-probs
    reinforce   -A logp           rloo                      seq_mean_token_sum      no
    rloo        -A logp           rloo                      seq_mean_token_sum      no
    ppo         clipped ratio     rloo                      seq_mean_token_sum      yes
    grpo        clipped ratio     grpo                      seq_mean_token_mean     yes
    dr_grpo     clipped ratio     dr_grpo                   token_sum / constant    yes
    dapo        clipped ratio     grpo                      token_mean              yes, and prompts that tell
                                                                                    nothing are left out
    gspo        response ratio    grpo                      seq_mean_token_mean     yes
    cispo       clipped weight    grpo                      token_mean              yes

Every kind takes `advantage="gae"` in place of its own: a critic's, one a token.

What they aim at. All of them see the return R = r - beta (log pi - log b), the regulariser inside the return and
detached. Where a policy is free enough, E[R] is highest where R is the same for every response, and there every
advantage is 0: no weighting of responses moves that point, neither grpo's division by the group's standard deviation
nor the 1 / length of seq_mean_token_mean. They do decide how it is approached. Dividing by the standard deviation turns
the last differences, which are noise, into advantages of size 1, so with a constant step the policy trembles around
the point instead of settling on it. And where the policy is not free enough, R varies at its best point, and weights of
1 / length (grpo, gspo) and of 1 / standard deviation between prompts (grpo, dapo, gspo, cispo) do move it (Liu et al.
2025, "Dr. GRPO"): rloo, reinforce, ppo and dr_grpo do not. A KL term in the loss, token by token, is not offered: its
gradient leaves out what a token does to the KL of those after it, so its optimum is another one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from irlfast.losses.aggregation import Aggregation

PolicyUpdateKind = Literal["reinforce", "rloo", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"]
Advantage = Literal["rloo", "grpo", "dr_grpo", "gae"]


class Recipe(NamedTuple):
    """advantage: the kind's own. aggregation: of the loss. ratio: it needs the log-probs the step started from, and so
    may take several optimiser steps on one batch. drops: prompts without a difference in return are left out."""

    advantage: Literal["rloo", "grpo", "dr_grpo"]
    aggregation: Aggregation
    ratio: bool = True
    drops: bool = False


RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe("rloo", "seq_mean_token_sum", ratio=False),
    "rloo": Recipe("rloo", "seq_mean_token_sum", ratio=False),
    "ppo": Recipe("rloo", "seq_mean_token_sum"),
    "grpo": Recipe("grpo", "seq_mean_token_mean"),
    "dr_grpo": Recipe("dr_grpo", "token_sum"),
    "dapo": Recipe("grpo", "token_mean", drops=True),
    "gspo": Recipe("grpo", "seq_mean_token_mean"),
    "cispo": Recipe("grpo", "token_mean"),
}
assert RECIPES.keys() == set(get_args(PolicyUpdateKind))
