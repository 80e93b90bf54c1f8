"""`python -m fd_dsa.accuracy retrieval`: does a served model find what long prompts hide?"""

from __future__ import annotations

from fd_dsa.accuracy.retrieval.command import add_parser, run

__all__ = ["add_parser", "run"]
