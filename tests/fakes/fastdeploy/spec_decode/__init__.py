"""Draft tokens (`spec_decode/`)."""

from .mtp import MTPProposer
from .ngram import NgramProposer

__all__ = ["MTPProposer", "NgramProposer"]
