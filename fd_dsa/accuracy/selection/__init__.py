"""What the indexer chose on real activations, layer by layer: the command `selection`."""

from __future__ import annotations

from fd_dsa.accuracy.selection.command import add_parser, run

__all__ = ["add_parser", "run"]
