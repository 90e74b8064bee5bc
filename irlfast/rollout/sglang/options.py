"""Settings of SGLang engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SGLangOptions:
    """How to start an SGLang server, and how patient to be with any."""

    python: str = ""
    """Interpreter of the environment that SGLang is installed in; by default this one. SGLang pins its own
    transformers, so an environment of its own is the rule."""
    tp_size: int = 1
    """Tensor-parallel size of a server started here: devices that share each layer."""
    pp_size: int = 1
    """Pipeline-parallel size of a server started here: devices that share the layers out."""
    max_total_tokens: int | None = None
    """Tokens in the key-value cache of a server started here. By default SGLang fills the device's memory; on a CPU,
    where that is the machine's, 16384."""
    port: int = 0
    """Port on the loopback interface for a server started here; 0 takes a free one."""
    start_timeout: float = 300.0
    """Seconds for a server to become ready, or to come back if it went away."""
    args: str = ""
    """Further arguments of sglang.launch_server, as in a shell, for example "--mem-fraction-static 0.6"."""
    env: tuple[str, ...] = ()
    """Further environment variables of a server started here, each NAME=VALUE."""
    request_timeout: float = 600.0
    """Seconds for one request, its time in the server's queue included."""
    retries: int = 3
    """How often a request is repeated whose connection dropped or that timed out."""
    prefix_tokens: int = 64
    """How many leading tokens of a prompt choose its server, where there are several."""
    check_tolerance: float | None = None
    """Most that a server may differ from the policy on a fixed prompt after an update, on average and as a share of
    1 + |log-prob|; by default 1e-3 for a float32 policy and 0.05 otherwise."""

    def __post_init__(self) -> None:
        for name, least in (("tp_size", 1), ("pp_size", 1), ("retries", 0), ("prefix_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_total_tokens is not None and self.max_total_tokens < 1:
            raise ValueError(f"max_total_tokens must be at least 1, or None, got {self.max_total_tokens}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65536), 0 for a free one, got {self.port}")
        for name in ("start_timeout", "request_timeout", "check_tolerance"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for entry in self.env:
            if "=" not in entry:
                raise ValueError(f"env entry {entry!r} has no '=': give NAME=VALUE")
