"""Loading of a causal language model for a command: on which device, with which tokenizer, ended by which tokens."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from irlfast.rollout import TransformersEngine


class LanguageModel(NamedTuple):
    """A transformers model, its tokenizer, and the ids that end and fill a row."""

    model: Any
    tokenizer: Any
    eos_token_ids: list[int]
    pad_token_id: int

    def engine(self) -> TransformersEngine:
        """Samples from the model as it is at each call."""
        return TransformersEngine(self.model, eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id)


def pick_device(device: str) -> str:
    """ "auto" is an accelerator where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_language_model(
    name: str, *, device: str = "auto", dtype: Literal["float32", "bfloat16"] = "float32"
) -> LanguageModel:
    """Load a model and its tokenizer from a folder or the hub.

    Raises:
        ValueError: a tokenizer without EOS.
        OSError: no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no EOS token: a response could never end")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    # Chat models end their turns with tokens of their own, which the generation settings name.
    further = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(further if isinstance(further, list) else [further])]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return LanguageModel(
        model=model.to(pick_device(device)),
        tokenizer=tokenizer,
        eos_token_ids=sorted({i for i in ids if i is not None}),
        pad_token_id=pad,
    )
