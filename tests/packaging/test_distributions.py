"""What the source distribution and the wheel hold, declare and link to."""

from __future__ import annotations

import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import irlfast

ROOT = Path(__file__).parents[2]

# The last three, which newer C libraries have within them, are asked for by the CUDA runtime; that itself is linked in.
SYSTEM = {"libc", "libm", "libgcc_s", "libstdc++", "libdl", "libpthread", "librt"}

pytestmark = pytest.mark.slow


def python_files(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def sdist_names(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def native(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        return Path(archive.extract(name, tmp_path_factory.mktemp("native")))


def test_sdist_holds_all_that_is_needed_to_build_and_test(sdist_names: set[str]) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed = python_files("irlfast") | python_files("kernels") | python_files("tests") | python_files("bench") | sources
    top = {"CMakeLists.txt", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"}
    assert needed | top <= sdist_names


def test_sdist_holds_nothing_that_was_built(sdist_names: set[str]) -> None:
    assert not [name for name in sdist_names if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")]


def test_wheel_holds_the_package_and_nothing_else(wheel_names: set[str]) -> None:
    kernels = {f"irlfast/{name}" for name in python_files("kernels")}
    expected = python_files("irlfast") | kernels | {"irlfast/py.typed", "irlfast/_native.pyi"}
    package = {name for name in wheel_names if ".dist-info/" not in name}
    native = {name for name in package if name.endswith(".so")}
    assert package - native == expected
    assert len(native) == 1
    assert native.pop().startswith("irlfast/_native.")


def test_wheel_says_what_it_is(metadata: Message, wheel_names: set[str]) -> None:
    assert metadata["Name"] == "irlfast"
    assert metadata["Version"] == irlfast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)
    assert metadata["Requires-Python"] == ">=3.10"
    assert "# irlfast" in str(metadata.get_payload())


def test_wheel_needs_torch_and_numpy_alone(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist") or []
    core = {requirement.split(">=")[0] for requirement in requirements if "extra ==" not in requirement}
    assert core == {"torch", "numpy"}


def test_build_does_not_require_torch() -> None:
    """An isolated build would fetch gigabytes."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {requirement.split(">=")[0] for requirement in requirements} == {"scikit-build-core", "pybind11"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_native_module_links_only_to_the_system(
    native: Path, environment: dict[str, str], run: Callable[..., Any]
) -> None:
    """One build serves every torch; torch's OpenMP is the only one; a machine without a driver imports it."""
    if shutil.which("readelf", path=environment["PATH"]) is None:
        pytest.skip("readelf is not on PATH")
    dynamic = run("readelf", "--dynamic", "--wide", native, env=environment).stdout
    linked = {line.split("[")[1].split(".so")[0] for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libc" in linked
    assert {name for name in linked if not name.startswith("ld-linux")} <= SYSTEM
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_native_module_exports_its_entry_alone(
    native: Path, environment: dict[str, str], run: Callable[..., Any]
) -> None:
    if shutil.which("nm", path=environment["PATH"]) is None:
        pytest.skip("nm is not on PATH")
    table = run("nm", "--dynamic", "--defined-only", native, env=environment).stdout
    functions = [line.split()[2] for line in table.splitlines() if line.split()[1] == "T"]
    assert functions == ["PyInit__native"]
