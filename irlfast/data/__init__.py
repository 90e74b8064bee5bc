"""Demonstrations and preferences: read, held apart, and tokenised."""

from .demonstrations import DataError, Demonstration, Message, load_demonstrations
from .demonstrations import split_demonstrations as split
from .preference_rows import Preference
from .preferences import Splits, load_preferences
from .tokenize import TokenizedDemonstration, TokenizedDemonstrations, digest, token_pieces, tokenize_demonstrations

__all__ = [
    "DataError",
    "Demonstration",
    "Message",
    "Preference",
    "Splits",
    "TokenizedDemonstration",
    "TokenizedDemonstrations",
    "digest",
    "load_demonstrations",
    "load_preferences",
    "split",
    "token_pieces",
    "tokenize_demonstrations",
]
