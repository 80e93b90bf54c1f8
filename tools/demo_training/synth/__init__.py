"""Synthetic chat, retrieval and instruction documents: pure Python, seeded, no download."""

from .checks import check
from .documents import Generator
from .instructions import Instruction

__all__ = ["Generator", "Instruction", "check"]
