"""Reward models on disk: `model.safetensors` and `config.json` in a folder.

Each file is written beside its place, synced and renamed, so a crash leaves the old file or the new one. The weights
carry the configuration too; a folder whose two files come from different saves is told from a whole one and refused.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from irlfast import __version__

from .model import RewardModel, RewardModelConfig

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_reward_model(model: RewardModel, directory: str | Path) -> None:
    """Write the model into `directory`, which is made if need be; other files there are left alone.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "irlfast_version": __version__, "config": asdict(model.config)}
    text = json.dumps(header, indent=2, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _replace(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"irlfast": text}))
    _replace(folder / CONFIG, (text + "\n").encode())
    if hasattr(os, "O_DIRECTORY"):  # a rename is safe from a power cut once its folder is synced
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_reward_model(directory: str | Path) -> RewardModel:
    """Read a model back, on the CPU, in the dtype it was saved in and in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is no such file, a newer format, or tensors that do not fit the configuration.
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
    config = _config(header, folder / CONFIG)
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as cause:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {cause}") from cause
    if "irlfast" in metadata and json.loads(metadata["irlfast"])["config"] != header["config"]:
        raise ValueError(f"{CONFIG} and {WEIGHTS} in {folder} come from different saves: save the model again")
    model = RewardModel(config)
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{folder / WEIGHTS} does not fit its configuration: missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {folder / WEIGHTS} has shape {list(tensor.shape)}, "
                f"the configuration asks for {list(expected[name].shape)}"
            )
    model.to(tensors["feature_mean"].dtype)
    model.load_state_dict(tensors)
    return model.eval()


def _config(header: Any, path: Path) -> RewardModelConfig:
    if not isinstance(header, dict) or not isinstance(header.get("config"), dict) or "format" not in header:
        raise ValueError(f'{path} must be an object with "format" and "config"; it is no reward model of irlfast')
    if not isinstance(header["format"], int) or header["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {header['format']!r}, written by irlfast {header.get('irlfast_version')}; "
            f"this irlfast {__version__} reads up to {FORMAT}: upgrade irlfast"
        )
    unknown = sorted(header["config"].keys() - {field.name for field in fields(RewardModelConfig)})
    if unknown or "hidden_size" not in header["config"]:
        raise ValueError(f"{path}: config needs hidden_size and has unknown fields {unknown}")
    return RewardModelConfig(**header["config"])


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
