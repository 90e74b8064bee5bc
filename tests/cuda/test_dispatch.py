"""Who gets the CUDA kernels, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from irlfast import _native
from irlfast.ops import (
    _cuda,
    importance_weights,
    policy_terms,
    sequence_logprobs,
    token_kl,
    token_logprobs,
    token_stats,
)

ZEROS, LABELS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)

CALLS: dict[str, Callable[[str], object]] = {
    "token_stats": lambda impl: token_stats(ZEROS, LABELS, impl=impl),
    "token_logprobs": lambda impl: token_logprobs(ZEROS, LABELS, impl=impl),
    "token_kl": lambda impl: token_kl(ZEROS, ZEROS, impl=impl),
    "sequence_logprobs": lambda impl: sequence_logprobs(ZEROS, impl=impl),
    "importance_weights": lambda impl: importance_weights(ZEROS[0], ZEROS[0], impl=impl),
    "policy_terms": lambda impl: policy_terms(ZEROS, ZEROS[:, 0], impl=impl),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_cpu_tensor_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_BUILT", True)
    with pytest.raises(
        RuntimeError, match="'cuda' is not available: the tensor is on cpu, the kernel runs on GPUs of N"
    ):
        CALLS[op]("cuda")


@pytest.mark.parametrize("op", CALLS)
def test_a_build_without_nvcc_says_so(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_BUILT", False)
    with pytest.raises(RuntimeError, match="built without CUDA kernels: no nvcc was found then, or IRLFAST_CUDA=OFF"):
        CALLS[op]("cuda")


def test_a_gpu_of_amd_is_no_gpu_of_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        dtype, is_cuda, is_cpu, device = torch.float32, True, False, torch.device("cuda:0")

    monkeypatch.setattr(_cuda, "_BUILT", True)
    monkeypatch.setattr(_cuda, "_HIP", True)
    assert _cuda.cuda_unavailable(OnGpu()) == "the tensor is on a GPU of AMD, the kernel runs on GPUs of NVIDIA"  # type: ignore[arg-type]


def test_a_device_that_nothing_was_compiled_for_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda._device_problem.cache_clear()
    monkeypatch.setattr(_native, "cuda_unavailable", lambda index: "no kernel image is available")
    assert str(_cuda._device_problem(0)).startswith(
        "cuda:0 says: no kernel image is available; irlfast was compiled for"
    )
    _cuda._device_problem.cache_clear()


def test_gpu_tensors_go_where_the_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered ops' function for the key that NVIDIA's and AMD's GPUs share."""
    run = _cuda.on_gpu(lambda x, *, y: ("cuda", y), lambda x, *, y: ("triton", y))
    for reason, taken in ((None, "cuda"), ("some reason", "triton")):
        monkeypatch.setattr(_cuda, "cuda_unavailable", lambda tensor, reason=reason: reason)
        assert run(ZEROS, y=3) == (taken, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_driver_means_no_devices_and_a_reason() -> None:
    assert _native.cuda_device_count() == 0
    assert _native.cuda_unavailable(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on addresses that are none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_launch_that_fails_raises(dtype: torch.dtype) -> None:
    logits, labels, out = ZEROS.to(dtype), LABELS, torch.empty(2)
    code = _native.DTYPES[str(dtype).removeprefix("torch.")]
    arguments = (
        logits.data_ptr(),
        code,
        (1, 2, 0, 5),
        5,
        labels.data_ptr(),
        1,
        -100,
        1.0,
        0,
        0.0,
        out.data_ptr(),
        0,
        0,
        0,
    )
    if _native.build_info()["cuda_emulated"]:
        _native.cuda_token_stats_forward(*arguments, 0, 0)
        assert out.tolist() == pytest.approx([-1.609438] * 2)
        return
    with pytest.raises(RuntimeError, match=r"CUDA: .* failed: |built without CUDA kernels"):
        _native.cuda_token_stats_forward(*arguments, 0, 0)


def test_native_code_refuses_null_and_nonsense() -> None:
    arguments = [1, 0, (1, 2, 0, 5), 5, 1, 1, -100, 1.0, 0, 0.0, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="logits is a null pointer"):
        _native.cuda_token_stats_forward(0, *arguments[1:])
    with pytest.raises(ValueError, match="device = -1 is negative"):
        _native.cuda_token_stats_forward(*arguments[:-2], -1, 0)
    with pytest.raises(ValueError, match="tokens = -3 is negative"):
        _native.cuda_sequence_logprobs_forward(1, 3, 0, True, -3, 1, 0, 0, 1, False, False, 1, 0, 0)
