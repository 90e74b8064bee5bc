"""The report of `irlfast doctor`, on an installation that works and on broken ones."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import irlfast
from irlfast import _native, doctor, ops
from irlfast.doctor import Check, collect, format_report, main


def failed() -> list[str]:
    return [check.name for check in collect() if check.status == "failed"]


def find(name: str) -> Check:
    (check,) = (check for check in collect() if check.name == name)
    return check


def test_a_working_installation_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    report = capsys.readouterr().out
    assert report.rstrip().endswith("irlfast works here")
    for expected in (irlfast.__version__, torch.__version__, _native.build_info()["compiler"], "optional packages"):
        assert expected in report


def test_every_function_of_ops_is_listed() -> None:
    listed = {check.name.split()[0] for check in collect() if check.section == "ops"}
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert listed == {name for name in functions if not name.endswith("_reference")}


def test_an_implementation_that_is_not_there_has_its_reason() -> None:
    value = find("token_stats on cpu").value
    assert value.startswith("cpu, reference (auto takes cpu)")
    reason = ops.token_stats.__globals__["IMPLEMENTATIONS"]["cuda"].unavailable(torch.empty(1, 1))
    assert reason is not None
    assert f"cuda: {reason}" in value


def test_every_usable_instruction_set_is_checked() -> None:
    checked = [check.name for check in collect() if check.section == "self-check"]
    assert checked == [f"token_stats ({isa})" for isa in _native.build_info()["isas_usable"]]


def test_a_missing_native_module_fails_and_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "irlfast._native", None)
    assert main() == 1
    report = capsys.readouterr().out
    assert "failed  irlfast._native" in report
    assert "pip install ." in report
    assert "transformers" in report, "the rest of the report is still there"


def test_a_native_module_of_another_version_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(irlfast, "__version__", "99.0")
    assert failed() == ["version"]


def test_wrong_statistics_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["irlfast.ops.token_stats"]
    right = module.statistics_cpu

    def wrong(*args: Any, isa: str, with_state: bool) -> Any:
        logprob, *rest = right(*args, isa=isa, with_state=with_state)
        return (logprob + (1e-3 if isa == "baseline" else 0.0), *rest)

    monkeypatch.setattr(module, "statistics_cpu", wrong)
    assert failed() == ["token_stats (baseline)"]


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    module = sys.modules["irlfast.ops.token_stats"]
    right = module.backward_cpu
    monkeypatch.setattr(module, "backward_cpu", lambda *args, isa: right(*args, isa=isa) + wrong)
    assert failed() == [f"token_stats ({isa})" for isa in _native.build_info()["isas_usable"]]


def test_the_self_check_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    collect()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("built", "compiler", "expected", "status"),
    [
        (True, "/cuda/bin/nvcc", "built by /cuda/bin/nvcc for 80-real, 90-real", "ok"),
        (False, "", "no nvcc was found", "absent"),
    ],
)
def test_cuda_build(monkeypatch: pytest.MonkeyPatch, built: bool, compiler: str, expected: str, status: str) -> None:
    info = {"cuda_built": built, "cuda_compiler": compiler, "cuda_architectures": ["80-real", "90-real"]}
    monkeypatch.setattr(doctor, "_load_native", lambda: (with_info(**info), ""))
    check = find("CUDA kernels")
    assert expected in check.value
    assert check.status == status


@pytest.mark.parametrize(("available", "expected"), [(True, "native (AVX512_BF16)"), (False, "by float32 copies")])
def test_bfloat16_products(monkeypatch: pytest.MonkeyPatch, available: bool, expected: str) -> None:
    monkeypatch.setattr(doctor, "_load_native", lambda: (with_info(bf16_product=available), ""))
    check = find("bfloat16 products")
    assert check.value.startswith(expected)
    assert check.status == ("ok" if available else "absent")


def with_info(**changes: Any) -> ModuleType:
    """A native module whose build_info differs."""
    module: Any = ModuleType("irlfast._native")
    module.__file__ = _native.__file__
    module.build_info = lambda: {**_native.build_info(), **changes}
    return module  # type: ignore[no-any-return]


def test_gpus_are_listed_one_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    devices = {check.name: check for check in doctor._devices()}
    assert set(devices) == {"cpu", "cuda:0", "cuda:1"}
    assert devices["cuda:1"].value == "Some GPU, 80 GiB, CUDA 13.0"


def test_a_torch_that_sees_no_gpu_says_what_it_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices = {check.name: check for check in doctor._devices()}
    assert devices["gpu"].value == "torch is built for CUDA 13.0 and sees no device"
    assert devices["gpu"].status == "absent"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [d for d in importlib.metadata.distributions() if d.name != "datasets"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: others)
    check = find("datasets")
    assert check.status == "absent"
    assert check.value == 'not installed: pip install "irlfast[train]"'
    assert failed() == []


def test_the_command_runs_with_torch_and_numpy_alone() -> None:
    code = f"""
import sys
for name in {[*doctor.OPTIONAL_PACKAGES]}:
    sys.modules[name] = None
from irlfast.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "irlfast works here" in done.stdout


def test_columns_are_aligned() -> None:
    report = format_report(
        [Check(section="a", name="x", value="1"), Check(section="b", name="long", value="2", status="absent")]
    )
    assert report.splitlines() == ["a", "  ok      x     1", "", "b", "  absent  long  2"]
