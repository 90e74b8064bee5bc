"""The TF-IDF rival learns what words tell, and nothing else."""

import random

import numpy as np
import pytest

from irlfast.data import Preference
from irlfast.eval.ranking import pair_wins

WORDS = "cat dog sun tree book fish rain song milk hill".split()  # noqa: SIM905


def _pairs(count: int, seed: int, *, informative: bool) -> list[Preference]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        texts = [" ".join(draw.choices(WORDS, k=8)) for _ in range(2)]
        texts.sort(key=lambda text: text.split().count("cat") - text.split().count("rain"), reverse=True)
        if not informative:
            draw.shuffle(texts)
        rows.append(Preference(prompt="", chosen=texts[0], rejected=texts[1]))
    return rows


@pytest.mark.parametrize(("informative", "low", "high"), [(True, 0.8, 1.0), (False, 0.4, 0.6)])
def test_it_learns_words_that_decide(informative: bool, low: float, high: float) -> None:
    pytest.importorskip("sklearn")
    from irlfast.eval.tfidf import TfidfReward

    reward = TfidfReward(_pairs(300, 0, informative=informative), _pairs(100, 1, informative=informative))
    test = _pairs(300, 2, informative=informative)
    wins = pair_wins(reward.scores([p.chosen for p in test]), reward.scores([p.rejected for p in test]))
    assert low <= wins.mean() <= high
    if informative:
        assert reward.scores(["cat"])[0] > reward.scores(["tree"])[0] > reward.scores(["rain"])[0]
        assert np.isfinite(reward.scores(["words never seen"])).all()
