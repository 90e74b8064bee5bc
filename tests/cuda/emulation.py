"""A pytest plugin: irlfast with the native module at IRLFAST_EMULATION, whose CUDA kernels run on the CPU."""

from __future__ import annotations

import importlib.util
import os
import sys

import irlfast

_path = os.environ["IRLFAST_EMULATION"]
_spec = importlib.util.spec_from_file_location("irlfast._native", _path)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["irlfast._native"] = _module
_spec.loader.exec_module(_module)
irlfast._native = _module
