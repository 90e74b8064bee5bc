"""Quality and diversity of sampled texts.

distinct-n      different n-grams / n-grams, over all texts together         Li et al. 2016 (arXiv 1510.03055)
self-BLEU       mean BLEU of each answer against the other answers to its prompt, in [0, 1]; less is more diverse
                Zhu et al. 2018 (arXiv 1802.01886)
ROUGE, chrF     of each answer against the reference, in [0, 1]              rouge-score, sacrebleu
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of different n-grams among all n-grams of `texts` (words or token ids); 0 where there is none.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(groups: Sequence[Sequence[str]]) -> float:
    """Mean BLEU, in [0, 1], of each text against the others of its group.

    Raises:
        ValueError: no group has two texts. ImportError: without the `sacrebleu` package.
    """
    bleu = _optional("sacrebleu.metrics", "sacrebleu").BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [*group[:i], *group[i + 1 :]]).score / 100
        for group in groups
        if len(group) > 1
        for i, text in enumerate(group)
    ]
    if not scores:
        raise ValueError("self-BLEU compares answers to one prompt with one another: give groups of at least 2 texts")
    return sum(scores) / len(scores)


def rouge(texts: Sequence[str], references: Sequence[str], kind: str = "rougeL") -> list[float]:
    """ROUGE F-measure of each text against its reference, in [0, 1]: "rouge1", "rouge2" or "rougeL".

    Raises:
        ImportError: without the `rouge-score` package.
    """
    scorer = _optional("rouge_score.rouge_scorer", "rouge-score").RougeScorer([kind])
    return [float(scorer.score(ref, text)[kind].fmeasure) for text, ref in zip(texts, references, strict=True)]


def chrf(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF of each text against its reference, in [0, 1].

    Raises:
        ImportError: without the `sacrebleu` package.
    """
    metric = _optional("sacrebleu.metrics", "sacrebleu").CHRF()
    return [metric.sentence_score(text, [ref]).score / 100 for text, ref in zip(texts, references, strict=True)]


def _optional(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise ImportError(f'this metric needs the {package} package: pip install "irlfast[train,eval]"') from cause
