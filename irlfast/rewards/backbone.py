"""A reward head on a transformers backbone of its own: frozen, with LoRA, or trained whole.

Reads token ids, not the hidden states of the trainer's reference: it may be any model, of another size or family, as
long as it shares the tokenizer. What is trained is saved with the head: the head alone, head and LoRA adapters, or head
and backbone; the rest comes from where the backbone was loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Reads
from .head import HeadConfig, PooledRewardModel, require_positive_int
from .reader import ReaderConfig, weights_digest

TUNINGS = ("frozen", "lora", "full")


@dataclass(frozen=True, kw_only=True)
class BackboneRewardConfig(HeadConfig):
    """The shape of a BackboneRewardModel: HeadConfig, and the backbone.

    Args:
        model: folder or hub name of the backbone; its language-model head, if it has one, is left out.
        tuning: "frozen", "lora" (through peft) or "full".
        lora_rank: rank of the LoRA matrices.
        lora_alpha: their scale is alpha / rank.
        lora_targets: names of the linear layers that get them, or "all-linear".

    Raises:
        ValueError: a value out of its range.
    """

    model: str
    tuning: Literal["frozen", "lora", "full"] = "frozen"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuning not in TUNINGS:
            raise ValueError(f"tuning {self.tuning!r} is unknown, expected one of {TUNINGS}")
        require_positive_int("lora_rank", self.lora_rank)
        if not isinstance(self.lora_targets, str):
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))


class BackboneRewardModel(PooledRewardModel):
    """A head on the last hidden states of a transformers model.

    Args:
        config: see BackboneRewardConfig.
        backbone: the base model (AutoModel), already loaded; None loads `config.model`.
    """

    model_type: ClassVar[str] = "backbone"
    reads: ClassVar[Reads] = "tokens"
    config_class = BackboneRewardConfig
    config: BackboneRewardConfig

    def __init__(self, config: BackboneRewardConfig, backbone: Any = None) -> None:
        if backbone is None:
            from transformers import AutoModel

            backbone = AutoModel.from_pretrained(config.model)
        super().__init__(config, backbone.config.get_text_config().hidden_size)
        # What is not saved has to be the same when it is loaded again.
        weights = "" if config.tuning == "full" else weights_digest(backbone)
        self.source = ReaderConfig(model=config.model, token_statistics=False, weights=weights)
        if config.tuning != "full":
            backbone.requires_grad_(False)
        if config.tuning == "lora":
            backbone = _with_lora(backbone, config)
        self.backbone = backbone

    def states(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's last hidden states [B, S, H], and the response's mask."""
        context = torch.set_grad_enabled(torch.is_grad_enabled() and self.config.tuning != "frozen")
        with context:
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
        return output.last_hidden_state, response_mask

    def saved_state(self) -> dict[str, Tensor]:
        """Everything but what `config.model` already holds."""
        trained = {f"backbone.{name}" for name, p in self.backbone.named_parameters() if p.requires_grad}
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("backbone.") or name in trained}

    def train(self, mode: bool = True) -> BackboneRewardModel:
        """Training mode for the head, and for a backbone that learns; a frozen one keeps its dropout off."""
        super().train(mode)
        if self.config.tuning == "frozen":
            self.backbone.eval()
        return self


def _with_lora(backbone: nn.Module, config: BackboneRewardConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as cause:
        raise ImportError('tuning = "lora" needs peft: pip install "irlfast[lora]"') from cause
    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    from transformers.pytorch_utils import Conv1D

    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.modules()),  # GPT-2's are transposed
    )
    return get_peft_model(backbone, adapters)
