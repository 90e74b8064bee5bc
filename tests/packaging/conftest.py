"""What is built from a copy of the sources, once for all packaging tests, without a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What builds and runs leave in the project's folder; the copy is as a fresh clone is.
OUTPUTS = {"build", "demo", "dist", "runs"}

# What a native build calls; the compiler finds the rest beside itself.
BUILD_TOOLS = ("cmake", "ninja", "make", "cc", "c++", "gcc", "g++", "ar", "ranlib", "ld", "as", "nm", "strip", "uname")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """An environment without a package index, in which the tools installed beside this Python come first."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if shutil.which("c++", path=path) is None:
        pytest.skip("no C++ compiler is on PATH")
    for module in ("build", "pip", "pybind11", "scikit_build_core"):
        pytest.importorskip(module, reason=f'building needs {module}: pip install -e ".[dev]"')
    variables = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUDACXX", "CUDA_PATH")
    }
    # One architecture where nvcc is: what a wheel holds and links to is the same for all.
    return {
        **variables,
        "PATH": path,
        "CUDAARCHS": "90-real",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


@pytest.fixture(scope="session")
def without_nvcc(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same environment on a machine without nvcc: no folder that holds one is on PATH."""
    tools = tmp_path_factory.mktemp("tools")
    for tool in BUILD_TOOLS:
        found = shutil.which(tool, path=environment["PATH"])
        if found is not None:
            (tools / tool).symlink_to(found)
    folders = [folder for folder in environment["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    path = os.pathsep.join([str(tools), *folders])
    assert shutil.which("nvcc", path=path) is None
    return {**environment, "PATH": path}


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a command and shows all it printed where its status is not the one expected."""

    def run(
        *command: str | Path, env: dict[str, str], cwd: Path | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which nothing is built."""
    folder = tmp_path_factory.mktemp("source") / "irlfast"

    def outputs(parent: str, names: list[str]) -> set[str]:
        compiled = {name for name in names if name == "__pycache__" or name.endswith(".so")}
        if Path(parent) != ROOT:
            return compiled
        return compiled | {
            n for n in names if n in OUTPUTS or n == ".git" or n.startswith(".venv") or n.endswith("_cache")
        }

    shutil.copytree(ROOT, folder, ignore=outputs)
    return folder


@pytest.fixture(scope="session")
def sdist(source: Path, environment: dict[str, str], run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, env=environment, cwd=source)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist: Path, environment: dict[str, str], run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what the source distribution holds and from nothing else."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (project,) = unpacked.iterdir()
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, env=environment, cwd=project)
    (archive_path,) = out.glob("*.whl")
    return archive_path


@pytest.fixture(scope="session")
def new_environment(
    environment: dict[str, str], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """Makes a virtual environment with what this one holds but editable installs; returns its Python."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("venv")
        venv.create(folder, symlinks=True)
        python = folder / "bin" / "python"
        where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=environment)
        site_packages = Path(where.stdout.strip())
        # Folders named in a .pth file have their own .pth files ignored, so editable installs do not come along.
        inherited = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        (site_packages / "inherited.pth").write_text("\n".join(inherited) + "\n")
        return python

    return make
