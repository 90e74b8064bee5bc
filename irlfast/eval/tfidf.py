"""The honest rival of a reward on hidden states: logistic regression on word counts, learned from the same pairs.

P(chosen over rejected) = sigma(w . (x_chosen - x_rejected)), x the TF-IDF weights of a text's words and word pairs: the
Bradley-Terry model with a linear reward r(y) = w . x. scikit-learn does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from irlfast.data import Preference

from .ranking import Array, pair_wins

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)


class TfidfReward:
    """A linear reward on TF-IDF weights of the answers.

    Args:
        train: pairs to learn from.
        validation: pairs that choose the strength of the ridge penalty.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, train: Sequence[Preference], validation: Sequence[Preference]) -> None:
        try:
            from scipy.sparse import vstack
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as cause:
            raise ImportError('the TF-IDF rival needs scikit-learn: pip install "irlfast[eval]"') from cause
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        self._vectorizer.fit(list(dict.fromkeys(text for p in train for text in (p.chosen, p.rejected))))
        chosen, rejected = (
            self._vectorizer.transform([getattr(p, side) for p in train]) for side in ("chosen", "rejected")
        )
        difference = chosen - rejected
        # Each pair the other way round as well: then both classes are there, and no intercept can be learned.
        rows, labels = vstack([difference, -difference]), np.repeat([1, 0], len(train))
        best = -1.0
        for strength in _STRENGTHS:
            model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000).fit(rows, labels)
            weights = model.coef_[0]
            accuracy = float(
                pair_wins(
                    self._score([p.chosen for p in validation], weights),
                    self._score([p.rejected for p in validation], weights),
                ).mean()
            )
            if accuracy > best:
                best, self.strength, self._weights = accuracy, strength, weights

    def scores(self, texts: Sequence[str]) -> Array:
        """Rewards [N] of texts."""
        return self._score(texts, self._weights)

    def _score(self, texts: Sequence[str], weights: Any) -> Array:
        return np.asarray(self._vectorizer.transform(list(texts)) @ weights, dtype=np.float64)
