"""Choices of the reference where rounding decides, and their form in a golden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("indexer", "router")
# number of the greedy run among the sequences of a case; a prompt's number is its length
GREEDY = 0


@dataclass(frozen=True)
class Choice:
    """One selection of the reference, to be fed to the other side.

    Attributes:
        kind: of KINDS.
        layer: index of the decoder layer.
        position: of the token in its sequence.
        chosen: key positions (indexer) or expert ids (router), ascending.
    """

    kind: str
    layer: int
    position: int
    chosen: tuple[int, ...]


def pack(choices: Mapping[int, Sequence[Choice]]) -> dict[str, np.ndarray]:
    """Arrays `fed_<kind>`, int32 [n, 3 + chosen]; columns sequence, layer, position, chosen.

    Args:
        choices: of each sequence, by its number.
    """
    arrays = {}
    for kind in KINDS:
        rows = [
            (sequence, choice.layer, choice.position, *choice.chosen)
            for sequence, several in choices.items()
            for choice in several
            if choice.kind == kind
        ]
        arrays[f"fed_{kind}"] = np.array(rows, np.int32).reshape(len(rows), -1 if rows else 3)
    return arrays


def unpack(arrays: Mapping[str, np.ndarray], sequence: int) -> list[Choice]:
    """The choices of one sequence of `pack`."""
    return [
        Choice(kind, layer, position, tuple(chosen))
        for kind in KINDS
        for number, layer, position, *chosen in arrays[f"fed_{kind}"].tolist()
        if number == sequence
    ]
