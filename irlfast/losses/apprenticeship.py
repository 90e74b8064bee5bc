"""Apprenticeship learning by projection (Abbeel and Ng 2004, section 3.1), for rewards linear in features.

    w = mu_E - mu_bar
    mu_bar <- mu_bar + ((mu - mu_bar) . (mu_E - mu_bar) / |mu - mu_bar|^2) (mu - mu_bar)

mu_E are the demonstrator's feature expectations, mu those of a policy that is optimal for the reward w . phi. The
margin |w| never rises, and where it is below eps a mixture of the policies met so far performs within eps of the
demonstrator under every reward of unit norm. There is no loss and no gradient: each round asks for a new optimal
policy's mu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rewards import check_rewards


class AbbeelNgProjection:
    """The projection method; `weights` is the reward to optimise next.

    Args:
        expert: [F] feature expectations of the demonstrator, mu_E.
        policy: [F] those of any first policy.

    Raises:
        TypeError, ValueError: vectors that do not fit or are not finite.
    """

    def __init__(self, expert: Tensor, policy: Tensor) -> None:
        check_rewards(expert=expert, policy=policy)
        self.expert = expert.detach().double()
        self.mixture = self._checked(policy)

    @property
    def weights(self) -> Tensor:
        """[F] float64, w = mu_E - mu_bar."""
        return self.expert - self.mixture

    @property
    def margin(self) -> float:
        """|w|: by how much at most a reward of unit norm prefers the demonstrator to the mixture of policies."""
        return float(torch.linalg.vector_norm(self.weights))

    def step(self, policy: Tensor) -> float:
        """Take in the feature expectations mu [F] of a policy that is optimal for `weights`; returns the new margin.

        A policy that is no closer to the demonstrator leaves mu_bar where it is: the reward is as good as it gets.
        """
        direction = self._checked(policy) - self.mixture
        length = float(direction @ direction)
        if length > 0:
            # A mixture of policies: the point stays on the segment between mu_bar and mu.
            share = min(max(float(direction @ self.weights) / length, 0.0), 1.0)
            self.mixture = self.mixture + share * direction
        return self.margin

    def _checked(self, policy: Tensor) -> Tensor:
        check_rewards(policy=policy)
        if policy.shape != self.expert.shape:
            raise ValueError(
                f"policy has shape {tuple(policy.shape)}; expected that of expert, {tuple(self.expert.shape)}"
            )
        return policy.detach().double()
