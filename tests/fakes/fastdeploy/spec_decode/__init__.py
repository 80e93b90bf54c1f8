"""Draft tokens (`spec_decode/`)."""

from .ngram import NgramProposer

__all__ = ["NgramProposer"]
