"""Demonstrations: read, held apart, and tokenised."""

from .demonstrations import DataError, Demonstration, Message, load_demonstrations
from .demonstrations import split_demonstrations as split
from .tokenize import TokenizedDemonstration, TokenizedDemonstrations, tokenize_demonstrations

__all__ = [
    "DataError",
    "Demonstration",
    "Message",
    "TokenizedDemonstration",
    "TokenizedDemonstrations",
    "load_demonstrations",
    "split",
    "tokenize_demonstrations",
]
