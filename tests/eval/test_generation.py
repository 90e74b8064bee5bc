"""Diversity and quality of texts: known values, and the packages they come from."""

import sys

import pytest

from irlfast.eval.generation import chrf, distinct_n, rouge, self_bleu


def test_distinct_n_counts_over_all_texts() -> None:
    assert distinct_n([["a", "b"], ["a", "b", "c"]], 1) == 3 / 5
    assert distinct_n([["a", "b"], ["a", "b", "c"]], 2) == 2 / 3
    assert distinct_n([["a"], []], 2) == 0.0
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([], 0)


def test_self_bleu_is_one_for_copies_and_near_none_for_strangers() -> None:
    pytest.importorskip("sacrebleu")
    same = "the cat sat on the mat today"
    assert self_bleu([[same, same, same]]) == pytest.approx(1.0)
    other = "a dog ran under some tree yesterday"
    assert self_bleu([[same, other]]) < 0.1
    assert self_bleu([[same, same], [same, other], [other]]) == pytest.approx((2 + 2 * self_bleu([[same, other]])) / 4)
    with pytest.raises(ValueError, match="groups of at least 2"):
        self_bleu([[same], []])


def test_rouge_and_chrf_against_references() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    assert rouge(["a b c d", "x"], ["a b c d", "y"]) == [1.0, 0.0]
    assert rouge(["a c"], ["a b c"]) == [pytest.approx(2 * (1 * 2 / 3) / (1 + 2 / 3))]
    assert rouge(["c a"], ["a b c"], "rouge1") == [pytest.approx(0.8)]
    assert chrf(["abc def", "xyz"], ["abc def", "abc"]) == [pytest.approx(1.0), 0.0]
    with pytest.raises(ValueError, match="zip"):
        rouge(["a"], [])


@pytest.mark.parametrize(("module", "package"), [("sacrebleu.metrics", "sacrebleu"), ("rouge_score", "rouge-score")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    metric = chrf if package == "sacrebleu" else rouge
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=rf'needs the {package} package: pip install "irlfast\[train,eval\]"'):
        metric(["a"], ["b"])
