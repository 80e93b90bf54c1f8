"""`python -m fd_dsa.accuracy matrix`: one model through every mode of the engine, side by side."""

from __future__ import annotations

from fd_dsa.accuracy.matrix.command import add_parser, run

__all__ = ["add_parser", "run"]
