"""irlfast in slime."""

from .loss import loss
from .tis import icepop, tis

__all__ = ["icepop", "loss", "tis"]
