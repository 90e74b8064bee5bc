"""Results in a JSON file: rows, and the runs they came from. Files merge, a newer row replacing an older one."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import irlfast
from irlfast import _native

Key = tuple[Any, ...]
PEER_PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "triton")


def empty() -> dict[str, Any]:
    return {"format": 1, "runs": {}, "rows": []}


def read(path: str | Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: the file is no results file of this version.
    """
    results = json.loads(Path(path).read_text())
    if not isinstance(results, dict) or results.get("format") != 1 or not {"runs", "rows"} <= set(results):
        raise ValueError(f"{path} is no results file of `python -m bench`: expected format 1 with runs and rows")
    return results


def write(path: str | Path, results: Mapping[str, Any]) -> None:
    """At once: whoever is interrupted keeps the file as it was. A row is a line, so that changes can be read."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**results, "rows": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n".join(map(json.dumps, results["rows"]))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{head}[\n{rows}\n]\n}}\n")
    temporary.replace(path)


def case_key(row: Mapping[str, Any]) -> Key:
    """What was measured together: two rows of one case and setting share it."""
    return (row["op"], row["line"], row["work"], *row["shape"], row["dtype"], row["malloc"], row["threads"])


def merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All rows of all parts; of two measurements of one case the newer. Runs without rows are dropped."""
    latest: dict[Key, list[dict[str, Any]]] = {}
    runs: dict[str, Any] = {}
    for part in parts:
        runs |= part["runs"]
        cases: dict[Key, list[dict[str, Any]]] = {}
        for row in part["rows"]:
            cases.setdefault(case_key(row), []).append(row)
        for key, rows in cases.items():
            if key not in latest or rows[0]["date"] >= latest[key][0]["date"]:
                latest[key] = rows
    rows = [row for group in latest.values() for row in group]
    used = {row["run"] for row in rows}
    return {"format": 1, "runs": {name: run for name, run in runs.items() if name in used}, "rows": rows}


def provenance(command: str) -> dict[str, Any]:
    """Where, when and with what a result was measured."""
    info = _native.build_info()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "irlfast": irlfast.__version__,
        "compiler": info["compiler"],
        "isa": info["isa"],
        "peers": {name: version for name in PEER_PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
