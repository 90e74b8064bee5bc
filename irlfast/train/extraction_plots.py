"""A picture of an extracted reward: whom it prefers, how it goes with a true reward, how it was learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .extraction import Epoch
from .extraction_report import HeldOut

_CHOSEN, _REJECTED = "tab:blue", "tab:orange"


def plot_extraction(picture: Path, scores: Tensor, heldout: HeldOut, histories: Sequence[Sequence[Epoch]]) -> None:
    """Draw test answers' rewards by side, the true reward against the learned one where it is known, and the learning
    curve of each seed.

    Args:
        picture: PNG file to write.
        scores: [R] rewards of all answers.
        heldout: test pairs and what is known of their answers.
        histories: passes of each seed's training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = scores.double().numpy()
    sides = {
        "chosen": np.unique(heldout.pairs.chosen.numpy()),
        "rejected": np.unique(heldout.pairs.rejected.numpy()),
    }
    answers = np.unique(np.concatenate(list(sides.values())))
    known = answers[~np.isnan(heldout.truth[answers])]
    panels = 3 if len(known) >= 2 else 2
    figure = Figure(figsize=(4.6 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]

    bins = np.linspace(values[answers].min(), values[answers].max() + 1e-9, 41)
    for (name, rows), color in zip(sides.items(), (_CHOSEN, _REJECTED), strict=True):
        axes[0].hist(values[rows], bins=bins, density=True, alpha=0.55, color=color, label=f"{name} ({len(rows)})")
    axes[0].set_title("test answers", fontsize=10)
    axes[0].set_xlabel("learned reward")
    axes[0].set_ylabel("density")
    axes[0].legend(fontsize=8)

    for history in histories:
        epochs = [row.epoch for row in history]
        axes[1].plot(epochs, [row.train_accuracy for row in history], color="tab:grey", linewidth=1)
        axes[1].plot(epochs, [row.validation_accuracy for row in history], color=_CHOSEN, linewidth=1)
    for color, label in (("tab:grey", "training pairs"), (_CHOSEN, "validation pairs")):
        axes[1].plot([], [], color=color, label=label)
    axes[1].axhline(0.5, linestyle=":", linewidth=1, color="grey")
    axes[1].set_title(f"pairs ranked right ({len(histories)} seeds)", fontsize=10)
    axes[1].set_xlabel("pass")
    axes[1].legend(fontsize=8)

    if panels == 3:
        # Few distinct true rewards would lie on top of one another.
        spread = np.ptp(heldout.truth[known])
        jitter = np.random.default_rng(0).uniform(-0.01, 0.01, len(known)) * spread
        axes[2].scatter(heldout.truth[known] + jitter, values[known], s=5, alpha=0.4, color=_CHOSEN, linewidths=0)
        axes[2].set_title("test answers", fontsize=10)
        axes[2].set_xlabel("true reward")
        axes[2].set_ylabel("learned reward")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
