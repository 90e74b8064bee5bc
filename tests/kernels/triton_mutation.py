"""Breaks a kernel on purpose, to see whether its tests notice.

with broken("_online_softmax", "(max - max)", "0.0"):
    ...     # the ops' Triton implementations now run kernels in which that text of that module is replaced
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

_PACKAGE = "irlfast.kernels"


class _Finder(MetaPathFinder):
    """Finds the modules of irlfast.kernels in another folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return spec_from_file_location(name, self._folder / f"{module}.py") if package == _PACKAGE else None


@contextmanager
def broken(module: str, old: str, new: str) -> Iterator[None]:
    """Within it, the modules of irlfast.kernels are copies, in one of which `old` is replaced by `new`.

    Raises:
        ValueError: the module does not contain `old`.
    """
    package = importlib.import_module(_PACKAGE)
    sources = list(Path(str(package.__file__)).parent.glob("*.py"))
    names = [source.stem for source in sources]
    saved = {name: sys.modules.pop(f"{_PACKAGE}.{name}", None) for name in names}
    attributes = {name: package.__dict__.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            text = source.read_text()
            if source.stem == module and old not in text:
                raise ValueError(f"{source.name} does not contain {old!r}: the break has to follow the kernel")
            (Path(folder) / source.name).write_text(text.replace(old, new) if source.stem == module else text)
        finder = _Finder(Path(folder))
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in names:
                sys.modules.pop(f"{_PACKAGE}.{name}", None)
                package.__dict__.pop(name, None)
                if (loaded := saved[name]) is not None:
                    sys.modules[f"{_PACKAGE}.{name}"] = loaded
                if attributes[name] is not None:
                    package.__dict__[name] = attributes[name]


def assert_noticed(module: str, old: str, new: str, proof: Callable[[], None]) -> None:
    """Asserts that the proof holds, and fails on an assertion with the module broken."""
    proof()
    with broken(module, old, new):
        try:
            proof()
        except Exception as error:
            if _is_assertion(error):
                return
            raise
    raise AssertionError(f"nobody noticed {new!r} in place of {old!r} in {module}.py")


def _is_assertion(error: BaseException | None) -> bool:
    """Whether it is a failed assertion, or one inside the interpreter, which wraps it."""
    return isinstance(error, AssertionError) or (error is not None and _is_assertion(error.__cause__))
