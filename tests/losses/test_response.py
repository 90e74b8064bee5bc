"""losses.response: response masks from prompt lengths and padding, values moved to their tokens, each error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.losses.response import response_batch

PAD, EOS = 0, 2
RIGHT = torch.tensor([[5, 6, 7, 8, EOS], [5, 6, 9, EOS, PAD], [5, PAD, 9, 9, 9]])  # the last has the pad id inside
LEFT = torch.tensor([[5, 6, 7, 8, EOS], [PAD, 5, 6, 9, EOS], [5, PAD, 9, 9, 9]])
BOTH = torch.tensor([[PAD, 5, 6, 7, EOS], [PAD, 5, 9, PAD, PAD]])
LENGTHS = [3, 2, 4]


def drawn(ids: Tensor, prompt_len: Any, **options: Any) -> list[str]:
    mask = response_batch(ids, prompt_len, **options).response_mask
    return ["".join("R" if x else "." for x in row) for row in mask.tolist()]


@pytest.mark.parametrize("as_given", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_prompt_length_is_one_a_row_and_eos_is_part_of_the_response(as_given: Any) -> None:
    assert drawn(RIGHT, as_given(LENGTHS), pad_token_id=PAD) == ["...RR", "..RR.", "....R"]


def test_one_prompt_length_serves_all_rows_where_it_is_a_number() -> None:
    assert drawn(RIGHT, 2, pad_token_id=PAD) == ["..RRR", "..RR.", "..RRR"]
    assert drawn(RIGHT, torch.tensor(2), pad_token_id=PAD) == ["..RRR", "..RR.", "..RRR"]


def test_padding_on_the_left_is_not_counted_as_prompt() -> None:
    assert drawn(LEFT, LENGTHS, pad_token_id=PAD) == ["...RR", "...RR", "....R"]
    assert drawn(BOTH, 1, pad_token_id=PAD) == ["..RRR", "..R.."]


def test_attention_mask_has_the_last_word() -> None:
    """As sampled by a model whose pad id is its EOS: the mask tells the EOS of row 0 from the padding of row 1."""
    ids = torch.tensor([[5, 6, EOS], [5, EOS, EOS]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert drawn(ids, 1, attention_mask=mask, pad_token_id=EOS, eos_token_ids=[EOS]) == [".RR", ".R."]
    with pytest.raises(
        ValueError, match="pad_token_id = 2 also ends responses: EOS, part of a response, cannot be told"
    ):
        response_batch(ids, 1, pad_token_id=EOS, eos_token_ids=[EOS])


def test_without_mask_and_pad_id_every_token_is_real() -> None:
    batch = response_batch(RIGHT, 2)
    assert batch.attention_mask is None
    assert batch.response_mask.sum() == 9


def test_a_row_of_its_own_is_a_batch_of_one() -> None:
    batch = response_batch(torch.tensor([5, 6, 7], dtype=torch.int32), 1, attention_mask=torch.tensor([1, 1, 0]))
    assert batch.input_ids.dtype == torch.int64
    assert batch.response_mask.tolist() == [[False, True, False]]


def test_rows_without_a_response_or_without_anything_are_allowed() -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, PAD], [PAD, PAD, PAD]])
    assert drawn(ids, 2, pad_token_id=PAD) == ["..R", "...", "..."]


def test_values_come_from_their_tokens_or_from_the_responses() -> None:
    batch = response_batch(LEFT, LENGTHS, pad_token_id=PAD)
    want = torch.tensor([[0, 0, 0, 1.0, 2], [0, 0, 0, 3, 4], [0, 0, 0, 0, 5]])
    nan = torch.nan
    by_response = torch.tensor([[1.0, 2], [3, 4], [5, nan]])
    by_token = torch.where(want == 0, nan, want)
    assert torch.equal(batch.per_token("x", by_response), want)
    assert torch.equal(batch.per_token("x", by_token), want)
    alone = response_batch(LEFT[0], 3)
    assert torch.equal(alone.per_token("x", torch.tensor([1.0, 2])), want[:1])
    assert torch.equal(alone.per_token("x", want[0]), want[:1])


def test_values_shifted_by_one_are_refused() -> None:
    """[B, T - 1], as log-probs of logits[:, :-1] come: taken for [B, R] they would move by the prompt."""
    batch = response_batch(LEFT, LENGTHS, pad_token_id=PAD)
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 4\); expected \(3, 5\), entry t at token t, or \(3, 2\), over"
    ):
        batch.per_token("x", torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("prompt_len", "message"),
    [
        (0, "prompt_len of row 0 is 0; expected at least 1"),
        (-1, "prompt_len of row 0 is -1; expected at least 1"),
        (5, "prompt_len of row 0 is 5; expected .* less than T = 5"),
        ([3, 4, 4], None),
        ([3, 5, 4], "prompt_len of row 1 is 5"),
        ([3, 2, 9], "prompt_len of row 2 is 9"),
        ([3, 2], r"prompt_len has shape \(2,\); expected one number, or one a row, \(3,\)"),
        ([[3], [2], [4]], r"prompt_len has shape \(3, 1\)"),
    ],
)
def test_prompt_lengths_outside_their_row_are_refused(prompt_len: Any, message: str | None) -> None:
    if message is None:
        assert drawn(RIGHT, prompt_len, pad_token_id=PAD)[1] == "....."  # all of its four tokens are prompt
        return
    with pytest.raises(ValueError, match=message):
        response_batch(RIGHT, prompt_len, pad_token_id=PAD)


def test_a_prompt_longer_than_its_padded_row_is_refused() -> None:
    ids = torch.tensor([[5, 6, 7, 8, EOS], [5, 6, EOS, PAD, PAD]])
    with pytest.raises(ValueError, match=r"prompt_len of row 1 is 4; .* no more than the row's 3 tokens"):
        response_batch(ids, 4, pad_token_id=PAD)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"attention_mask\[1\] has padding between real tokens"):
        response_batch(RIGHT, 2, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]))
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \(3, 4\); expected that of enc_input_ids, \(3, 5\)"
    ):
        response_batch(RIGHT, 2, attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"enc_input_ids has shape \(1, 3, 5\); expected \[B, T\]"):
        response_batch(RIGHT[None], 2)
    with pytest.raises(TypeError, match=r"enc_input_ids is torch\.float32; expected a tensor of integer token ids"):
        response_batch(RIGHT.float(), 2)
    with pytest.raises(TypeError, match="enc_input_ids is list"):
        response_batch([[1, 2]], 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"prompt_len has dtype torch\.float32"):
        response_batch(RIGHT, torch.tensor(2.0))
