"""Reward models on disk: `model.safetensors` and `config.json` in a folder.

Each file is written beside its place, synced and renamed, so a crash leaves the old file or the new one. The weights
carry the configuration too; a folder whose two files come from different saves is told from a whole one and refused.

Format 2 of `config.json` names the kind of model and the language model whose states it reads; format 1 is an MLP that
says nothing of that, and is still read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from irlfast import __version__

from .base import BaseRewardModel
from .create import make_config, model_class
from .reader import ReaderConfig

FORMAT = 2
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_reward_model(model: BaseRewardModel, directory: str | Path) -> None:
    """Write the model into `directory`, which is made if need be; other files there are left alone.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "format": FORMAT,
        "irlfast_version": __version__,
        "model_type": model.model_type,
        "config": asdict(model.config),
        "source": None if model.source is None else asdict(model.source),
    }
    text = json.dumps(header, indent=2, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.saved_state().items()}
    _replace(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"irlfast": text}))
    _replace(folder / CONFIG, (text + "\n").encode())
    if hasattr(os, "O_DIRECTORY"):  # a rename is safe from a power cut once its folder is synced
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_reward_model(directory: str | Path, *, backbone: str | None = None) -> BaseRewardModel:
    """Read a model of any kind back, on the CPU, in the dtype it was saved in and in evaluation mode.

    Args:
        directory: what `save_reward_model` wrote.
        backbone: folder or hub name of a backbone that is no longer where it was; without meaning for other kinds.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is no such file, a newer format, tensors that do not fit the configuration, or a
            backbone with other weights than the one that was trained on.
    """
    safetensors = _safetensors()
    folder = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {folder} is no reward model saved by irlfast")
    try:
        header = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as cause:
        raise ValueError(f"{folder / CONFIG} is not JSON: {cause}") from cause
    model = _model(header, folder / CONFIG, backbone)
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as cause:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {cause}") from cause
    if "irlfast" in metadata and json.loads(metadata["irlfast"])["config"] != header["config"]:
        raise ValueError(f"{CONFIG} and {WEIGHTS} in {folder} come from different saves: save the model again")
    expected = model.saved_state()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{folder / WEIGHTS} does not fit its configuration: missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {folder / WEIGHTS} has shape {list(tensor.shape)}, "
                f"the configuration asks for {list(expected[name].shape)}"
            )
    # What is missing here was not saved because it comes from elsewhere: the names were compared above.
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.eval()


def _model(header: Any, path: Path, backbone: str | None) -> BaseRewardModel:
    """The model that a configuration describes, untrained."""
    if not isinstance(header, dict) or not isinstance(header.get("config"), dict) or "format" not in header:
        raise ValueError(f'{path} must be an object with "format" and "config"; it is no reward model of irlfast')
    if not isinstance(header["format"], int) or header["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {header['format']!r}, written by irlfast {header.get('irlfast_version')}; "
            f"this irlfast {__version__} reads up to {FORMAT}: upgrade irlfast"
        )
    cls = model_class(header.get("model_type", "mlp"), where=str(path))
    moved = {"model": backbone} if cls.reads == "tokens" and backbone is not None else {}
    model = cls(make_config(cls, {**header["config"], **moved}, where=str(path)))
    if header.get("source") is None:
        return model
    source = ReaderConfig(**header["source"])
    if model.source is not None and source.weights and model.source.weights != source.weights:
        raise ValueError(
            f"the backbone at {model.source.model} has weights {model.source.weights}, the reward in {path.parent} was "
            f"trained on {source.model} with weights {source.weights}: give that one"
        )
    if model.source is None:
        model.source = source
    return model


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as cause:
        raise ImportError('reward models are saved with safetensors: pip install "irlfast[train]"') from cause
    return safetensors
