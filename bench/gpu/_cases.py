"""What is measured on a GPU, the most telling first: the run ends when its minutes are over, wherever it is."""

from __future__ import annotations

from dataclasses import dataclass

from bench._case import Case
from bench.importance import EQUAL
from bench.linear_policy_ref_stats import WORK as PAIR
from bench.policy_terms import PPO, WITH_KL
from bench.token_stats import BOTH, LOGPROB

# torch's own on a GPU: it hands no memory back while a process lives.
ALLOCATOR = "caching"

ROWS = 8192
LINEAR_BOTH, LINEAR_LOGPROB, FROZEN = f"linear {BOTH}", f"linear {LOGPROB}", f"linear {LOGPROB}, frozen head"

# Depth and vocabulary of models.
QWEN3_8B, LLAMA3_8B, GEMMA2_9B = (4096, 151936), (4096, 128256), (3584, 256000)
PYTHIA_160M, QWEN3_600M, WIDE = (768, 50304), (1024, 151936), (2048, 248320)
# What each of four GPUs has of a vocabulary that is split, beside the collectives.
QWEN3_8B_QUARTER = (4096, 37984)
MODELS = (LLAMA3_8B, QWEN3_8B, GEMMA2_9B, PYTHIA_160M, QWEN3_600M, WIDE)
SOFTCAPS = {GEMMA2_9B: 30.0}


@dataclass(frozen=True, kw_only=True)
class GpuCase(Case):
    """A case with the settings that matter there.

    Attributes:
        outputs: what is asked of everybody, in words; `work` says the settings too.
        masked: percent of rows whose label is ignored and whose upstream gradients are 0.
        std: standard deviation of the logits; at 3 a row is peaked, at 1 it is not.
        softcap: of the logits.
    """

    outputs: str
    masked: int = 0
    std: float = 3.0
    softcap: float | None = None


def gpu_case(
    line: str,
    op: str,
    outputs: str,
    shape: tuple[int, ...],
    *,
    dtype: str = "bfloat16",
    masked: int = 0,
    std: float = 3.0,
    softcap: float | None = None,
) -> GpuCase:
    words = [
        outputs,
        f"{masked} % masked" if masked else "",
        f"N(0, {std:g})" if std != 3 else "",
        f"softcap {softcap:g}" if softcap else "",
    ]
    return GpuCase(
        op=op,
        line=line,
        work=", ".join(filter(None, words)),
        shape=shape,
        dtype=dtype,
        mallocs=(ALLOCATOR,),
        outputs=outputs,
        masked=masked,
        std=std,
        softcap=softcap,
    )


def _statistics(outputs: str, rows: int, vocab: int, **settings: float) -> GpuCase:
    line = "A" if outputs == LOGPROB else "B"
    return gpu_case(line, "token_stats", outputs, (rows, vocab), **settings)  # type: ignore[arg-type]


def _divergence(rows: int, vocab: int) -> GpuCase:
    return gpu_case("C", "token_kl", "reverse KL", (rows, vocab))


def _linear(outputs: str, model: tuple[int, int], masked: int = 0, rows: int = ROWS) -> GpuCase:
    shape = (rows, *model)
    return gpu_case("D", "linear_token_stats", outputs, shape, masked=masked, softcap=SOFTCAPS.get(model))


def _pair(model: tuple[int, int]) -> GpuCase:
    return gpu_case("D", "linear_policy_ref_stats", PAIR, (ROWS, *model))


def _policy(outputs: str, batch: int, length: int) -> GpuCase:
    return gpu_case("E", "policy_terms", outputs, (batch, length), dtype="float32")


def _weights(groups: int, samples: int) -> GpuCase:
    return gpu_case("E", "importance", EQUAL, (groups, samples), dtype="float32")


_QWEN, _LLAMA, _GEMMA, _PYTHIA, _WIDE = (m[1] for m in (QWEN3_8B, LLAMA3_8B, GEMMA2_9B, PYTHIA_160M, WIDE))

CASES: tuple[GpuCase, ...] = (
    # One of each kind.
    _statistics(BOTH, ROWS, _LLAMA),
    _statistics(LOGPROB, ROWS, _LLAMA),
    _linear(LINEAR_LOGPROB, LLAMA3_8B),
    _divergence(ROWS, _LLAMA),
    _linear(FROZEN, LLAMA3_8B),
    _policy(WITH_KL, 64, 512),
    _policy(PPO, 1024, 8192),
    _weights(512, 64),
    _linear(LINEAR_BOTH, LLAMA3_8B),
    _statistics(BOTH, ROWS, _QWEN),
    _pair(QWEN3_600M),
    _linear(LINEAR_BOTH, QWEN3_600M),
    # Masked rows, flat rows, few rows, many rows.
    _statistics(BOTH, ROWS, _QWEN, masked=60),
    _linear(LINEAR_LOGPROB, QWEN3_600M, masked=60),
    _statistics(BOTH, 1024, _LLAMA),
    _statistics(BOTH, 32768, _LLAMA),
    _statistics(BOTH, 65537, _PYTHIA),
    _statistics(BOTH, ROWS, _QWEN, std=1),
    # The other models.
    _divergence(ROWS, _QWEN),
    _linear(LINEAR_LOGPROB, PYTHIA_160M),
    _statistics(BOTH, ROWS, _PYTHIA),
    _linear(FROZEN, QWEN3_600M),
    _linear(LINEAR_LOGPROB, GEMMA2_9B),
    _statistics(BOTH, ROWS, _GEMMA, softcap=30),
    _policy(WITH_KL, 1024, 8192),
    _policy(PPO, 256, 2048),
    _weights(64, 8),
    _linear(FROZEN, GEMMA2_9B),
    _linear(LINEAR_LOGPROB, WIDE),
    _statistics(BOTH, ROWS, _WIDE),
    _linear(LINEAR_LOGPROB, QWEN3_8B),
    _linear(LINEAR_LOGPROB, QWEN3_8B_QUARTER),
    _linear(LINEAR_LOGPROB, QWEN3_8B, rows=32768),  # the plan's 768 MiB
    _linear(LINEAR_LOGPROB, QWEN3_600M),
    _linear(FROZEN, QWEN3_8B),
    _linear(FROZEN, PYTHIA_160M),
    _linear(FROZEN, WIDE),
    _divergence(ROWS, _PYTHIA),
    _divergence(ROWS, _GEMMA),
    _divergence(ROWS, _WIDE),
    _pair(LLAMA3_8B),
    _pair(QWEN3_8B),
    _pair(PYTHIA_160M),
    _pair(WIDE),
    _statistics(BOTH, ROWS, _QWEN, masked=30),
    _linear(LINEAR_LOGPROB, QWEN3_600M, masked=30),
    _statistics(LOGPROB, ROWS, _QWEN),
    _statistics(BOTH, 4096, _LLAMA),
    _statistics(BOTH, 16384, _LLAMA),
    _policy(PPO, 64, 512),
)


def in_the_model(case: GpuCase) -> bool:
    """Whether the cost model's table has it: those with the usual number of rows, each unmasked and peaked."""
    if case.line == "E":
        return True
    return case.shape[0] == ROWS and not case.masked and case.std == 3 and case.outputs not in (LOGPROB, LINEAR_BOTH)
