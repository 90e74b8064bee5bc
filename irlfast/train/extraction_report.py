"""What is said of an extracted reward, on test pairs alone: order, classes, a true reward, length, other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irlfast.data import Preference
from irlfast.eval.ranking import (
    Array,
    best_f1_threshold,
    bootstrap_mean,
    correlations,
    f1_score,
    pair_wins,
    reward_distance,
)
from irlfast.eval.text import roc_auc

from .answers import Answers, Pairs


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Test pairs, validation pairs for the threshold, and what is known of their answers.

    Args:
        pairs, validation: as rows of the answers.
        truth: [R] a ground-truth reward of each answer, NaN where none is known.
        lengths: [R] tokens.
        label_threshold: an answer is positive where its truth is at least this; None: where it was chosen.
    """

    pairs: Pairs
    validation: Pairs
    truth: Array
    lengths: Array
    label_threshold: float | None = None

    @staticmethod
    def of(
        answers: Answers,
        pairs: tuple[Pairs, Sequence[Preference]],
        validation: tuple[Pairs, Sequence[Preference]],
        label_threshold: float | None = None,
    ) -> HeldOut:
        """From what `Answers.pairs` returned."""
        truth = np.full(len(answers.lengths), np.nan)
        for rows, preferences in (pairs, validation):
            for chosen, rejected, row in zip(rows.chosen.tolist(), rows.rejected.tolist(), preferences, strict=True):
                for place, score in ((chosen, row.chosen_score), (rejected, row.rejected_score)):
                    if score is not None:
                        truth[place] = score
        return HeldOut(
            pairs=pairs[0],
            validation=validation[0],
            truth=truth,
            lengths=answers.lengths.double().numpy(),
            label_threshold=label_threshold,
        )


def ranking_report(scores: Tensor, heldout: HeldOut) -> dict[str, Any]:
    """Figures of one reward.

    Args:
        scores: [R] rewards of all answers.
        heldout: see HeldOut.

    Returns:
        pairs, prompts: how many.
        accuracy, accuracy_low, accuracy_high: share of test pairs ranked as preferred, ties half, and its 95 %
            bootstrap interval over prompts (over pairs where there is one prompt).
        auc, f1, f1_threshold: of positive against negative answers, the threshold fitted on validation answers.
        length_spearman: rank correlation of reward and length over test answers.
        truth_accuracy (with _low, _high): share of test pairs whose order agrees with the true reward's, where that
            differs; pearson, spearman, kendall: with the true reward over test answers. Only where one is known.
    """
    values = scores.double().numpy()
    chosen, rejected = heldout.pairs.chosen.numpy(), heldout.pairs.rejected.numpy()
    prompts = heldout.pairs.prompt.tolist()
    clusters = prompts if len(set(prompts)) > 1 else None
    accuracy = bootstrap_mean(pair_wins(values[chosen], values[rejected]), clusters=clusters)
    answers = np.unique(np.concatenate([chosen, rejected]))
    rows, labels = _labels(heldout.pairs, heldout)
    fit_rows, fit_labels = _labels(heldout.validation, heldout)
    threshold = best_f1_threshold(values[fit_rows], fit_labels)
    report: dict[str, Any] = {
        "pairs": len(chosen),
        "prompts": len(set(prompts)),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "auc": roc_auc(torch.tensor(values[rows[labels == 1]]), torch.tensor(values[rows[labels == 0]])),
        "f1": f1_score(values[rows], labels, threshold),
        "f1_threshold": threshold,
        "length_spearman": correlations(values[answers], heldout.lengths[answers]).spearman,
    }
    known = answers[~np.isnan(heldout.truth[answers])]
    if len(known) >= 2:
        differ = heldout.truth[chosen] != heldout.truth[rejected]
        differ &= ~np.isnan(heldout.truth[chosen]) & ~np.isnan(heldout.truth[rejected])
        if differ.any():
            sign = np.where(heldout.truth[chosen] > heldout.truth[rejected], 1.0, -1.0)[differ]
            wins = pair_wins(sign * values[chosen[differ]], sign * values[rejected[differ]])
            kept = [prompts[i] for i in np.flatnonzero(differ)] if clusters is not None else None
            order = bootstrap_mean(wins, clusters=kept)
            report |= {
                "truth_accuracy": order.value,
                "truth_accuracy_low": order.low,
                "truth_accuracy_high": order.high,
            }
        found = correlations(values[known], heldout.truth[known])
        report |= {"pearson": found.pearson, "spearman": found.spearman, "kendall": found.kendall}
    return report


def identifiability(scores: Sequence[Tensor], pairs: Pairs) -> dict[str, float]:
    """How far rewards of several seeds agree on the test answers: what the data does not settle, they settle by chance.

    Returns:
        spearman_min, spearman_mean: rank correlation of every two; distance_max, distance_mean: their distance after
        taking off each prompt's mean and the scale (irlfast.eval.ranking.reward_distance). Empty for one seed.
    """
    if len(scores) < 2:
        return {}
    rows, prompts = _answers_of(pairs)
    values = [s.double().numpy()[rows] for s in scores]
    ranks = [correlations(a, b).spearman for a, b in combinations(values, 2)]
    # Where each prompt has a pair alone, its mean still leaves their difference.
    distances = [reward_distance(a, b, groups=prompts) for a, b in combinations(values, 2)]
    return {
        "spearman_min": float(np.min(ranks)),
        "spearman_mean": float(np.mean(ranks)),
        "distance_max": float(np.max(distances)),
        "distance_mean": float(np.mean(distances)),
    }


def _answers_of(pairs: Pairs) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Distinct answers and the prompt of each."""
    prompt_of: dict[int, int] = {}
    for column in (pairs.chosen, pairs.rejected):
        prompt_of.update(zip(column.tolist(), pairs.prompt.tolist(), strict=True))
    return np.array(list(prompt_of)), list(prompt_of.values())


def _labels(pairs: Pairs, heldout: HeldOut) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Distinct answers that have a label, and the labels."""
    chosen, rejected = set(pairs.chosen.tolist()), set(pairs.rejected.tolist())
    if heldout.label_threshold is None:
        # One that was preferred here and not there has no label.
        rows = [*(chosen - rejected), *(rejected - chosen)]
        return np.array(rows), np.array([1] * len(chosen - rejected) + [0] * len(rejected - chosen))
    known = np.array([row for row in chosen | rejected if not np.isnan(heldout.truth[row])])
    return known, (heldout.truth[known] >= heldout.label_threshold).astype(np.int64)
