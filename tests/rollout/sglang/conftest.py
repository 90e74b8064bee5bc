"""One real SGLang server for all tests of this folder, in an environment that is kept between runs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.rollout import SGLangEngine, SGLangOptions

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file
from sglang_checks import EOS, PAD
from stand_in import StandIn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", type=Path, help="write what the faults cost to this file")


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """A function from a fault's name and its figures to a line of the file that --faults-json names."""
    # Known where this folder was asked for on the command line alone.
    path: Path | None = request.config.getoption("--faults-json", default=None)
    faults: dict[str, dict[str, Any]] = {}
    yield lambda fault, **figures: faults.__setitem__(fault, figures)
    if path is not None:
        from bench._results import provenance

        command = "python -m pytest tests/rollout/sglang/test_faults.py --faults-json docs/results/sglang_faults.json"
        path.write_text(json.dumps({"provenance": provenance(command), "faults": faults}, indent=1) + "\n")


def _environment(serve: Path) -> Path:
    """A virtual environment as `serve` makes it, in the user's cache folder; one test run at a time builds it."""
    requirements = serve.parent / "requirements.txt"
    stamp = re.sub(r"\W+", "-", requirements.read_text().splitlines()[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not os.access(cache if cache.exists() else cache.parent, os.W_OK):
        cache = Path(tempfile.gettempdir())
    venv = cache / "irlfast-tests" / f"{stamp}-py{sys.version_info.major}.{sys.version_info.minor}"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (venv / ".sglang-ready").exists():
            # The lines of `serve` that make the environment, without the last, which starts the server.
            script = serve.read_text().replace('exec "$venv/bin/python"', ": ")
            (venv.parent / "serve").write_text(script)
            (venv.parent / "requirements.txt").write_text(requirements.read_text())
            subprocess.run(["bash", str(venv.parent / "serve"), str(venv), "none", "0"], check=True)
    return venv


@pytest.fixture(scope="session")
def sglang_options() -> SGLangOptions:
    """How to start the real server here; tests are skipped where the recipe for its environment is absent."""
    serve = Path(__file__).resolve().parents[3].parent / "shared" / "sglang" / "serve"
    if not serve.is_file():
        pytest.skip(f"no recipe for an SGLang environment at {serve}")
    try:
        venv = _environment(serve)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{shlex.join(error.cmd)} could not make an environment for SGLang")
    return SGLangOptions(
        python=str(venv / "bin" / "python"),
        max_total_tokens=8192,
        args="--random-seed 7 --max-running-requests 32",
        env=(f"PYTHONPATH={serve.parent / 'shim'}", "HF_HUB_OFFLINE=1", "SGLANG_CPU_OMP_THREADS_BIND=1"),
    )


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.close()


@pytest.fixture(scope="session")
def stories_path(shared_data: Path) -> str:
    return str(shared_data / "models" / "stories260K")


@pytest.fixture(scope="session")
def load_stories(stories_path: str) -> Callable[[], Any]:
    """A function to a fresh copy of the language model that the server starts with."""
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(stories_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def engine(sglang_options: SGLangOptions, stories_path: str, load_stories: Callable[[], Any]) -> Iterator[SGLangEngine]:
    """The engine that started the server; tests leave it with the original weights."""
    with torch.random.fork_rng():
        engine = SGLangEngine(
            stories_path, eos_token_id=EOS, pad_token_id=PAD, policy=load_stories(), options=sglang_options
        )
    yield engine
    engine.close()


@pytest.fixture
def policy(engine: SGLangEngine, load_stories: Callable[[], Any]) -> Iterator[Any]:
    """The engine's policy, with the original weights in it and in the server, before the test and after it."""
    original = load_stories().state_dict()
    assert engine.policy is not None
    engine.policy.load_state_dict(original)
    engine.update_weights(None, 0)
    yield engine.policy
    engine.policy.load_state_dict(original)


@pytest.fixture(scope="session")
def prompts(shared_data: Path, stories_path: str) -> list[list[int]]:
    """The first tokens of eight real stories, of different lengths."""
    from transformers import AutoTokenizer

    from irlfast.data import load_demonstrations, tokenize_demonstrations

    rows = load_demonstrations(str(shared_data / "text" / "tinystories_1000.jsonl.gz"), limit=8)
    tokenizer = AutoTokenizer.from_pretrained(stories_path)
    parts = tokenize_demonstrations(rows, tokenizer, max_response_tokens=8, prompt_tokens=24)
    return [list(row.prompt_ids[: 6 + 2 * i]) for i, row in enumerate(parts)]
