"""Rollouts from SGLang, over HTTP or in a process of their own."""

from .engine import SGLangEngine, SGLangServerEngine
from .errors import SGLangError, SGLangRefused, SGLangUnreachable
from .options import SGLangOptions

__all__ = [
    "SGLangEngine",
    "SGLangError",
    "SGLangOptions",
    "SGLangRefused",
    "SGLangServerEngine",
    "SGLangUnreachable",
]
