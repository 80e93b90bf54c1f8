"""Synthetic chat, retrieval and instruction documents: pure Python, seeded, no download."""

from .checks import chat_counts, check
from .documents import Generator

__all__ = ["Generator", "chat_counts", "check"]
