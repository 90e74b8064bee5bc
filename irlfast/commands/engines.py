"""Which engine samples, as options of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from irlfast.rollout import RolloutEngine, SGLangEngine, SGLangOptions, SGLangServerEngine

from .language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What samples: the policy in this process, an SGLang server started for it, or servers that run already."""

    engine: Literal["transformers", "sglang"] = "transformers"
    """transformers samples in this process; sglang from a server, which is started unless `urls` names some."""
    urls: tuple[str, ...] = ()
    """Addresses of SGLang servers to attach to, each http://host:port; they serve `model` or one of its shape."""
    weights_folder: Path | None = None
    """Send the policy's weights through this folder, which the servers can read too, and not over HTTP."""
    sglang: Annotated[SGLangOptions, tyro.conf.arg(name="")] = field(default_factory=SGLangOptions)
    """SGLang."""

    def __post_init__(self) -> None:
        if self.urls and self.engine != "sglang":
            raise ValueError(f"rollout.urls = {self.urls} needs rollout.engine sglang, got {self.engine}")

    def make(self, loaded: LanguageModel, model_path: str) -> RolloutEngine:
        """The engine; `close` it at the end.

        Args:
            loaded: what is trained.
            model_path: where that came from, which a server of our own starts with.
        """
        if self.engine == "transformers":
            return loaded.engine()
        common: dict[str, Any] = {
            "eos_token_id": loaded.eos_token_ids,
            "pad_token_id": loaded.pad_token_id,
            "policy": loaded.model,
            "weights_folder": self.weights_folder,
            "options": self.sglang,
        }
        if self.urls:
            return SGLangServerEngine(self.urls, **common)
        return SGLangEngine(model_path, server_device=loaded.model.device.type, **common)
