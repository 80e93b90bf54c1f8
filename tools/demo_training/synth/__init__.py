"""Synthetic chat, retrieval and instruction documents: pure Python, seeded, no download."""

from .checks import check
from .documents import Generator

__all__ = ["Generator", "check"]
