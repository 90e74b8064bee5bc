"""Objectives for policies and rewards. Each returns its loss to minimise and a dict of detached 0-d metrics."""

from irlfast.losses.reward import RewardLoss, maxent_irl_loss

__all__ = ["RewardLoss", "maxent_irl_loss"]
