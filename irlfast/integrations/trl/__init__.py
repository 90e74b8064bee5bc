"""Learned rewards in TRL's GRPOTrainer and RLOOTrainer (docs/trl.md): one that goes on learning, one that is saved.

reward = OnlineReward(reward_model, demonstrations, reference=start_policy)
GRPOTrainer(..., reward_funcs=reward, callbacks=[reward.callback])
"""

from .config import OnlineRewardConfig
from .online import OnlineReward
from .saved import SavedReward
from .text import demonstrations_for_trl

__all__ = ["OnlineReward", "OnlineRewardConfig", "SavedReward", "demonstrations_for_trl"]
