"""Known rewards by hand."""

import pytest

from irlfast.eval.text_rewards import positive_sentences, word_length


def test_share_of_sentences_with_a_positive_word() -> None:
    texts = ["Tom was happy. He ran! Did he smile?", "unhappy people", "", "...", "Love"]
    assert positive_sentences([""] * 5, texts) == pytest.approx([2 / 3, 0.0, 0.0, 0.0, 1.0])


def test_word_length_does_not_grow_with_the_text() -> None:
    assert word_length([""] * 3, ["a bb ccc", "a bb ccc " * 50, ""]) == pytest.approx([-2.0, -2.0, -4.0])
