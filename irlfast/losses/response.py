"""Where the responses are in a batch of token ids: prompt lengths and padding in, masks out.

A row is padding, prompt, response, padding, either padding possibly empty. EOS is the last token of a response that
ended, and part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ResponseBatch(NamedTuple):
    """input_ids [B, T] int64; attention_mask [B, T] bool, the real tokens, or None where all are; response_mask [B, T]
    bool, the response tokens; order [B, T] int64, which token of its response each response token is, from 0."""

    input_ids: Tensor
    attention_mask: Tensor | None
    response_mask: Tensor
    order: Tensor

    def per_token(self, name: str, values: Tensor) -> Tensor:
        """Values [B, T] at their tokens, 0 outside the responses, from [B, T] (entry t belongs to token t) or [B, R].

        R is the length of the longest response and [i, j] belongs to the j-th token of row i's response. With one row
        the first dimension may be left out. ValueError: any other shape, so also [B, T - 1], shifted by one.
        """
        rows, length = self.input_ids.shape
        longest = int(self.response_mask.sum(dim=1).max()) if rows else 0
        if values.dim() == 1 and rows == 1:
            values = values[None]
        if values.shape == (rows, longest) and longest:
            values = values.gather(1, self.order.clamp(0, longest - 1))
        elif values.shape != (rows, length):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; expected {(rows, length)}, entry t at token t, or "
                f"{(rows, longest)}, over the tokens of each response"
            )
        return torch.where(self.response_mask, values, 0.0)


def response_batch(
    input_ids: Tensor,  # (B, T) or (T)
    prompt_len: int | Sequence[int] | Tensor,
    *,
    attention_mask: Tensor | None = None,  # shaped as input_ids
    pad_token_id: int | None = None,
    eos_token_ids: Sequence[int] = (),
) -> ResponseBatch:
    """Find the response of each row.

    Args:
        input_ids: [B, T] integers, or [T] for one row.
        prompt_len: tokens in the prompt, padding not counted: one number, or one a row.
        attention_mask: non-zero on real tokens, which are adjacent in each row.
        pad_token_id: where there is no attention_mask, leading and trailing tokens with this id are padding. Inside a
            row the id is a token like any other.
        eos_token_ids: what ends a response; only to refuse a pad_token_id that is one of them.

    Raises:
        TypeError: ids that are not integers. ValueError: shapes that do not fit, a prompt length outside [1, T) or
            above the row's number of real tokens (a row of nothing but padding may have any), padding inside a row, or
            a pad id that is also EOS, for then the EOS of a response cannot be told from padding.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"enc_input_ids is {kind}; expected a tensor of integer token ids")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of enc_input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
        attention_mask = None if attention_mask is None else attention_mask[None]
    if input_ids.dim() != 2:
        raise ValueError(f"enc_input_ids has shape {tuple(input_ids.shape)}; expected [B, T], or [T] for one row")
    input_ids = input_ids.long()
    if attention_mask is not None:
        real = attention_mask.bool()
    elif pad_token_id is not None:
        if pad_token_id in eos_token_ids:
            raise ValueError(
                f"pad_token_id = {pad_token_id} also ends responses: EOS, part of a response, cannot be told from "
                "padding; give attention_mask"
            )
        token = (input_ids != pad_token_id).long()
        real = (token.cumsum(1) > 0) & (token.flip(1).cumsum(1).flip(1) > 0)
    else:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    starts = real & ~torch.nn.functional.pad(real[:, :-1], (1, 0))
    broken = starts.sum(dim=1) > 1
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise ValueError(f"attention_mask[{row}] has padding between real tokens; it may stand before and after them")

    prompt = _prompt_lengths(prompt_len, real)
    order = real.long().cumsum(dim=1) - 1 - prompt[:, None]
    padded = attention_mask is not None or pad_token_id is not None
    return ResponseBatch(input_ids, real if padded else None, real & (order >= 0), order)


def _prompt_lengths(prompt_len: int | Sequence[int] | Tensor, real: Tensor) -> Tensor:
    """[B] int64 on the device of real [B, T], each within its row."""
    rows, width = real.shape
    given = torch.as_tensor(prompt_len)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"prompt_len has dtype {given.dtype}; expected integers, the number of prompt tokens")
    if given.dim() == 0:
        given = given.expand(rows)
    if given.shape != (rows,):
        raise ValueError(f"prompt_len has shape {tuple(given.shape)}; expected one number, or one a row, ({rows},)")
    given = given.to(real.device, torch.int64)
    length = real.sum(dim=1)
    wrong = (given < 1) | (given >= width) | ((given > length) & (length > 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"prompt_len of row {row} is {int(given[row])}; expected at least 1 (the first response token is predicted "
            f"from the prompt), less than T = {width}, and no more than the row's {int(length[row])} tokens"
        )
    return given
