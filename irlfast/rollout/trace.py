"""What a batch has sampled so far, and which of its rows go on."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that have ended are dropped when no more than this share is left. With responses of 15 out of 200 tokens sampling
# is 1.7 times as fast for it; any share from 0.5 to 0.99 measures the same, and a low one copies the cache less often.
_COMPACT_AT = 0.7
# Looking whether rows have ended stalls an accelerator, so it is done once in so many steps there.
_ACCELERATOR_CHECK_EVERY = 8


class Trace:
    """What was sampled, [B, T], while rows that have ended drop out of the running batch."""

    def __init__(self, rows: int, steps: int, eos: Tensor, pad_token_id: int) -> None:
        device = eos.device
        self._eos = eos
        self._tokens = torch.full((steps, rows), pad_token_id, device=device)
        self._logprobs = torch.zeros(2, steps, rows, device=device)
        self._rows: Tensor | None = None
        self._live = torch.ones(rows, dtype=torch.bool, device=device)
        self._steps = 0
        self._check_every = 1 if device.type == "cpu" else _ACCELERATOR_CHECK_EVERY

    def record(self, step: int, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
        """Note the running batch's tokens, sampler log-probs and model log-probs."""
        tokens, sampler_logprobs, model_logprobs = drawn
        rows = slice(None) if self._rows is None else self._rows
        self._tokens[step, rows] = tokens
        self._logprobs[0, step, rows] = sampler_logprobs.float()
        self._logprobs[1, step, rows] = model_logprobs.float()
        self._live &= ~torch.isin(tokens, self._eos) if len(self._eos) > 1 else tokens != self._eos
        self._steps = step + 1

    def live_rows(self, step: int) -> Tensor | None:
        """Which rows of the running batch to go on with, or None for all of them."""
        if (step + 1) % self._check_every:
            return None
        live = int(self._live.sum())
        if live > _COMPACT_AT * len(self._live):
            return None
        keep = self._live.nonzero()[:, 0]
        self._rows = keep if self._rows is None else self._rows[keep]
        self._live = self._live[keep]
        return keep

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, sampler and model log-probs [B, steps]. What stands after a row's EOS is of no meaning."""
        tokens, logprobs = self._tokens[: self._steps].T, self._logprobs[:, : self._steps].transpose(1, 2)
        return tokens, logprobs[0], logprobs[1]
