"""A policy's weights as an SGLang server takes them: whole, merged, under the names of its checkpoint, checked.

The server ends on a wrong shape and ignores an unknown name, so what it expects is worked out here, from the model's
configuration, and nothing that does not fit is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irlfast.causal_lm import unwrap


@dataclass(frozen=True, kw_only=True)
class WeightSnapshot:
    """Weights at one moment, in host memory.

    tensors: by checkpoint name. version: the policy's version. probe: [P] ids that were scored, and probe_logprobs:
    [P - 1] what the policy said of them, or None where there is no policy to ask.
    """

    tensors: Mapping[str, Tensor]
    version: int
    probe: tuple[int, ...] = ()
    probe_logprobs: Tensor | None = None


class ExpectedWeights:
    """Names and shapes of a model's checkpoint.

    Args:
        config: a transformers configuration; the model is laid out on the meta device and takes no memory.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        own = model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(value.shape) for name, value in own.items()}
        first: dict[int, str] = {}
        self.tied = {name: first.setdefault(id(value), name) for name, value in own.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether the named shapes are this model's, all of it. A tied weight is enough under one of its names.

        Raises:
            ValueError: unknown or missing names, or the first shape that differs.
        """
        unknown = [name for name in shapes if name not in self.shapes]
        given = {self.tied[name] for name in shapes if name in self.tied}
        missing = [name for name in self.shapes if self.tied[name] not in given]
        if unknown or missing:
            raise ValueError(
                f"these weights are not the served model's: missing {missing[:5]}, unknown {unknown[:5]}; "
                "nothing was sent"
            )
        for name, shape in shapes.items():
            if tuple(shape) != self.shapes[name]:
                raise ValueError(
                    f"{name} has shape {list(shape)}, the served model {list(self.shapes[name])}; nothing was sent"
                )


def policy_tensors(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights, one whole tensor after another, on the CPU, under its checkpoint's names.

    LoRA adapters are added to the weights they adapt, W + s B A, and the policy is left as it is. A tensor that is
    sharded (FSDP2, any DTensor) is gathered when its turn comes, so that one whole tensor at a time is in device
    memory; every rank has to go through all of them. A tied weight comes once.

    Raises:
        ValueError: an adapter that cannot be merged, or a weight that is not finite.
    """
    seen: set[int] = set()
    for name, value in _merged(policy):
        if id(value) in seen:
            continue
        seen.add(id(value))
        whole = _whole(value.detach()).to("cpu", copy=True).contiguous()
        if whole.is_floating_point() and not bool(whole.isfinite().all()):
            raise ValueError(f"{name} of the policy is not finite: training has diverged; resume from a checkpoint")
        yield name, whole


def _merged(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by checkpoint name, each adapted weight with its adapters added."""
    model = unwrap(policy)
    adapted = _adapted_layers(model)
    for name, value in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        layer = next((path for path in adapted if owner == path or owner.startswith(path + ".")), None)
        if layer is None:
            yield name, value
        elif owner == f"{layer}.base_layer":
            yield f"{layer}.{leaf}", _adapted(adapted[layer], layer, value) if leaf == "weight" else value


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    modules = dict(model.named_modules())
    layers = {name: m for name, m in modules.items() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")}
    for name, layer in layers.items():
        if not hasattr(layer, "get_delta_weight") or any(getattr(layer, "use_dora", {}).values()):
            raise ValueError(f"the adapter at {name} ({type(layer).__name__}) is no plain LoRA and cannot be merged")
    wrapped = [name for name, m in modules.items() if hasattr(m, "modules_to_save")]
    if wrapped:
        raise ValueError(f"modules_to_save ({wrapped[0]}) cannot be merged: train these weights without a wrapper")
    return layers


def _adapted(layer: Any, name: str, weight: Tensor) -> Tensor:
    if layer.merged:
        return weight
    merged = _whole(weight.detach())
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            delta = layer.get_delta_weight(adapter)
            merged = merged + _whole(delta.detach()).to(merged.dtype)
    return merged


def _whole(value: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; a collective call then."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a model folder's safetensors files, read from their headers.

    Raises:
        FileNotFoundError: there is none.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}: save the model there first")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return shapes


def save_folder(snapshot: WeightSnapshot, config: Any, folder: Path) -> None:
    """Write a snapshot as a model folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(snapshot.tensors), str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)


def buckets(tensors: Mapping[str, Tensor], size: int = 1 << 29) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in runs of about `size` bytes, each at least one tensor."""
    run: list[tuple[str, Tensor]] = []
    total = 0
    for name, value in tensors.items():
        if run and total + value.nbytes > size:
            yield run
            run, total = [], 0
        run.append((name, value))
        total += value.nbytes
    if run:
        yield run


@torch.no_grad()
def probe_logprobs(policy: nn.Module, probe: tuple[int, ...]) -> Tensor:
    """[P - 1] float32 log-probs of probe[1:], each given all before it, in evaluation mode."""
    from irlfast.causal_lm import causal_lm_token_stats
    from irlfast.rollout.modules import eval_mode

    device = next(policy.parameters()).device
    ids = torch.tensor([probe], device=device)
    with eval_mode(policy):
        stats = causal_lm_token_stats(policy, ids, path="logits")
    return stats.logprob[0, 1:].float().cpu()
