"""What the trainer tells the reward: who the policy is, that a step was taken, that it saves, that it resumed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .online import OnlineReward

FOLDER = "irlfast_reward"


class OnlineRewardCallback(TrainerCallback):
    """Drives an OnlineReward; `OnlineReward.callback` is one.

    The reward's state is written to `checkpoint-N/irlfast_reward` beside what the trainer writes, and read from there
    when the trainer resumes.
    """

    def __init__(self, reward: OnlineReward) -> None:
        self.reward = reward

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A trainer may evaluate before it trains."""
        self.reward.bind(given["model"], given["processing_class"], args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.reward.bind(given["model"], given["processing_class"], args)
        folder = _checkpoint(args, state)
        self.reward.begin(state.global_step, state.max_steps, folder / FOLDER)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.reward.end_step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there though the trainer saved: irlfast's reward is saved beside a trainer whose "
                "checkpoints lie in args.output_dir, which those of a hyper-parameter search do not"
            )
        self.reward.save(folder / FOLDER)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
