"""What the indexer chose on real activations, layer by layer: the command `selection`."""

from __future__ import annotations
