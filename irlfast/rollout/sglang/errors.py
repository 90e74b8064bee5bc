"""What can go wrong between this process and an SGLang server, by what can be done about it."""

from __future__ import annotations


class SGLangError(RuntimeError):
    """Anything about a server that a caller has to know of; the two kinds below are the ones worth telling apart."""


class SGLangRefused(SGLangError):
    """The server answered that it will not do this (4xx, 5xx), or answered what cannot be understood. Asking
    again changes nothing.

    status: the HTTP status, or None where the fault is in what the answer says.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class SGLangUnreachable(SGLangError):
    """No answer: the connection was refused or dropped, or the answer took too long. Asking again may help."""
