"""The reward inside an IQ-trained language model as a function of text, read from the run that trained it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from irlfast.data import TokenizedDemonstration, token_pieces
from irlfast.rewards.iq import IQReward
from irlfast.scorer import RewardScorer, Score, TextForm, TextScorer
from irlfast.train.checkpoint import latest_checkpoint


class IQScorer(TextScorer):
    """Scores texts by an IQ-trained model: r_t, its sum, and log pi of each token as the advantage.

    Each Score has the sum as `reward`, the r_t as `token_rewards` (kind "sum"), and in `components` log_likelihood, the
    sum of log pi, and, with a reference, log_ratio, that of log pi - log pi_ref, which does not follow likelihood.

    Args:
        reward: reads rewards off the model.
        tokenizer: the model's.
        form: how texts become tokens.
        batch_size: sequences in one pass.
    """

    def __init__(self, reward: IQReward, tokenizer: Any, *, form: TextForm | None = None, batch_size: int = 32) -> None:
        super().__init__(tokenizer, form=form, batch_size=batch_size)
        self.reward = reward
        reward.model.eval()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        reference: str | None = None,
        device: str = "cpu",
        form: TextForm | None = None,
        batch_size: int = 32,
    ) -> IQScorer:
        """Load the model that a run of `irlfast iq` trained.

        Args:
            directory: the run's folder, whose newest checkpoint is taken, or a checkpoint's.
            reference: folder or hub name of the model that log_ratio is relative to; None takes the run's base_model
                where the run says so, and gives no log_ratio elsewhere.
            device, form, batch_size: as for RewardScorer.

        Raises:
            FileNotFoundError: no checkpoint of IQ-Learn there.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = find_iq_checkpoint(Path(directory))
        if folder is None:
            raise FileNotFoundError(
                f"no checkpoint of IQ-Learn in {directory}: give the folder of a run of `irlfast iq`"
            )
        options = json.loads((folder / "state.json").read_text(encoding="utf-8"))["config"]
        file = folder.parent.parent / "config.json"
        run = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        reference = reference or run.get("base_model")

        def load(name: str | Path) -> Any:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            return loaded.to(device).eval()

        reward = IQReward(
            load(folder / "policy"),
            gamma=options["gamma"],
            temperature=options["temperature"],
            truncated=options["truncated"],
            reference=None if reference is None else load(reference),
        )
        trained = TextForm(
            prompt_tokens=run.get("data", {}).get("prompt_tokens", TextForm().prompt_tokens),
            max_response_tokens=options["response_length"],
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        return cls(reward, tokenizer, form=form or trained, batch_size=batch_size)

    def score_tokens(self, rows: Sequence[TokenizedDemonstration], *, tokens: bool = False) -> Iterator[Score]:
        """Score tokenised rows in one pass."""
        device = next(self.reward.model.parameters()).device
        batch = self._batch(rows, device)
        ended = torch.tensor([not row.truncated for row in rows], device=device)
        found = self.reward(batch.input_ids, batch.attention_mask, batch.response_mask, ended)
        for index, row in enumerate(rows):
            mask = batch.response_mask[index]
            components = {"log_likelihood": float(found.advantages[index].sum())}
            if found.relative_returns is not None:
                components["log_ratio"] = float(found.relative_returns[index])
            yield Score(
                reward=float(found.returns[index]),
                normalised=None,
                tokens=token_pieces(row.response_ids, self.tokenizer) if tokens else [],
                token_rewards=found.rewards[index][mask].tolist() if tokens else None,
                kind="sum" if tokens else None,
                components=components,
                advantages=found.advantages[index][mask].tolist() if tokens else None,
            )


def load_scorer(
    directory: str | Path, *, model: str | None, device: str, batch_size: int, beside: TextScorer | None = None
) -> TextScorer:
    """The scorer for whatever learned a reward there: an IQ-trained model, or a reward model.

    model: for a reward model the language model whose states it reads, for an IQ-trained one the reference.
    beside: as for RewardScorer.from_pretrained; without meaning for an IQ-trained model.
    """
    if find_iq_checkpoint(Path(directory)) is not None:
        return IQScorer.from_pretrained(directory, reference=model, device=device, batch_size=batch_size)
    return RewardScorer.from_pretrained(directory, model=model, device=device, batch_size=batch_size, beside=beside)


def find_iq_checkpoint(folder: Path) -> Path | None:
    """A checkpoint of IQ-Learn: the folder itself, or the newest of the run in it; None for anything else."""
    state = folder / "state.json"
    if state.is_file():
        return folder if json.loads(state.read_text(encoding="utf-8")).get("trainer") == "iq_learn" else None
    if (folder / "checkpoints").is_dir():
        newest = latest_checkpoint(folder / "checkpoints")
        return None if newest is None else find_iq_checkpoint(newest)
    return None
