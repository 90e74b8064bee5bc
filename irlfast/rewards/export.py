"""A linear reward as transformers' AutoModelForSequenceClassification, which other trainers take for a reward model.

Such a model is logits = w . h at the last token that is not padding, with one label and (in most families) no constant.
So a linear reward on the last token's state fits into it: the features' standardisation and the normaliser's 1 / scale
go into w,

    (w_r . (h - mean) / std + b - m) / s  =  (w_r / (std s)) . h + offset

and the offset, which no comparison of two responses depends on, into the bias where the family has one, else into the
configuration as "irlfast_offset".
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backbone import BackboneRewardModel
from .base import BaseRewardModel
from .head import PooledRewardModel
from .pooling import pooling_kinds

_INSTEAD = "Use it as a function instead: irlfast.scorer.RewardScorer (docs/rewards.md has one for TRL)"


class ExportError(ValueError):
    """The reward is none that a sequence classifier can hold; the message says why and what to use instead."""


def export_sequence_classifier(
    reward: BaseRewardModel, folder: str | Path, tokenizer: Any, language_model: nn.Module | None = None
) -> float:
    """Write `reward` and what it reads as a sequence classifier with one label, and check it by loading it again.

    Args:
        reward: a RewardModel or BackboneRewardModel with hidden_sizes=(), pooling="last", no layer norm and no bound;
            one on hidden states reads the last layer without token statistics.
        folder: where to write; made if need be.
        tokenizer: of the language model, with a padding token that is not EOS: the classifier judges the last token
            that is not padding, and EOS is part of every response.
        language_model: whose hidden states the reward reads; not needed for a backbone, whose LoRA is merged in.

    Returns:
        The offset: reward.serve(...) = logits[:, 0] + offset; 0 where the classifier has a bias.

    Raises:
        ExportError: a reward that does not fit, or a family without a linear sequence classifier.
        ValueError: a tokenizer without a padding token of its own, or no language model.
    """
    _require_linear(reward)
    assert isinstance(reward, PooledRewardModel)
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, its EOS is {tokenizer.eos_token!r}: set "
            "tokenizer.pad_token to a token that no response contains, or the classifier judges the token before EOS"
        )
    base = _base_model(reward, language_model)
    classifier = _classifier(base, pad)
    offset = _fold(reward, classifier)
    classifier.config.irlfast_offset = offset
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check(reward, base, Path(folder), offset, pad)
    return offset


def _require_linear(reward: BaseRewardModel) -> None:
    problems = []
    if not isinstance(reward, PooledRewardModel):
        problems.append(f"a {type(reward).__name__} is not a linear map of one token's state")
    else:
        config = reward.config
        if config.hidden_sizes:
            problems.append(f"hidden_sizes = {config.hidden_sizes}, expected ()")
        if pooling_kinds(config.pooling) != ("last",):
            problems.append(f"pooling = {config.pooling!r}, expected 'last'")
        if config.layer_norm:
            problems.append("layer_norm = True, expected False")
        if config.output_bound is not None:
            problems.append(f"output_bound = {config.output_bound}, expected None")
        if reward.normalizer.clip is not None:
            problems.append(f"its normaliser clips at {reward.normalizer.clip}")
        if reward.reads == "hidden_states" and (reward.source is None or reward.source.token_statistics):
            problems.append("it reads token statistics beside the states, expected token_statistics = False")
        if reward.source is not None and reward.source.layer != -1:
            problems.append(f"it reads layer {reward.source.layer}, expected the last, -1")
    if problems:
        raise ExportError(f"this reward does not fit into a sequence classifier: {'; '.join(problems)}. {_INSTEAD}")


def _base_model(reward: PooledRewardModel, language_model: Any) -> Any:
    """The model without a head whose last states the reward reads, a copy where it has to be changed."""
    if isinstance(reward, BackboneRewardModel):
        if hasattr(reward.backbone, "merge_and_unload"):
            return copy.deepcopy(reward.backbone).merge_and_unload()
        return reward.backbone
    if language_model is None:
        raise ValueError("give language_model=, the model whose hidden states the reward was trained on")
    return language_model.base_model


def _classifier(base: Any, pad: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = pad
    try:
        classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as cause:
        raise ExportError(f"transformers has no sequence classifier for {config.model_type}. {_INSTEAD}") from cause
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ExportError(f"the sequence classifier for {config.model_type} has no linear layer `score`. {_INSTEAD}")
    classifier.base_model.load_state_dict(base.state_dict())
    return classifier.to(next(base.parameters()).dtype).eval()


@torch.no_grad()
def _fold(reward: PooledRewardModel, classifier: Any) -> float:
    """Put the reward into the classifier's layer; returns the offset that did not fit."""
    linear: Any = reward.network[-1]
    scale, level = reward.normalizer.scale, float(reward.normalizer.mean)
    weight = linear.weight.double() / reward.feature_std.double()
    offset = -float(weight[0] @ reward.feature_mean.double()) - level
    if linear.bias is not None:
        offset += float(linear.bias)
    classifier.score.weight.copy_(weight / scale)
    if classifier.score.bias is None:
        return offset / scale
    classifier.score.bias.fill_(offset / scale)
    return 0.0


@torch.no_grad()
def _check(reward: PooledRewardModel, base: Any, folder: Path, offset: float, pad: int) -> None:
    """Compare what was written with the reward on three rows, two of them padded."""
    from transformers import AutoModelForSequenceClassification

    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.get_text_config().vocab_size, (3, 8), generator=generator)
    ids[ids == pad] = (pad + 1) % base.config.get_text_config().vocab_size
    real = torch.arange(8) < torch.tensor([[8], [5], [1]])
    ids[~real] = pad
    device = next(base.parameters()).device
    ids, real = ids.to(device), real.to(device)
    states = base(input_ids=ids, attention_mask=real.long()).last_hidden_state
    features = reward.features(ids, real, real) if reward.reads == "tokens" else reward.features(states, real)
    want = reward.normalizer.normalize(reward.head(features)).float().cpu()
    got = loaded(input_ids=ids.cpu(), attention_mask=real.long().cpu()).logits[:, 0].float() + offset
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
        raise ExportError(
            f"the sequence classifier for {base.config.model_type} gives {got.tolist()} where the reward is "
            f"{want.tolist()}: it does not judge the last token's state as it is. {_INSTEAD}"
        )
