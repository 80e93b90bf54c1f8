"""Decode steps of a stack of layers, and what each must read and compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES as INDEX_BYTES
from fd_dsa.ops._fp8 import LATENT_RECORD_BYTES as LATENT_BYTES

LAYERS = 61
TOPK, RANK, ROPE = 2048, 512, 64
# heads of DeepSeek-V3.2 on one device, and on each of eight
HEADS = (128, 16)
OURS, PEERS = "ours", "peers"
SLOTS, SCHEDULES, ALL = "A", "B", "B and rest"
GRAPH, EAGER = "graph", "eager"


@dataclass(frozen=True)
class Shape:
    """Decode rows that all have as many keys.

    Attributes:
        heads: attention heads on the device; the indexer is whole.
        rows: requests, one new token each.
        keys: of a row, the new one included.
    """

    heads: int
    rows: int
    keys: int

    @property
    def label(self) -> str:
        """The shape in words."""
        return f"{self.heads} heads, {self.rows} x {self.keys >> 10}k"

    @property
    def cache_blocks(self) -> int:
        """Blocks of 64 keys of one layer."""
        return self.rows * self.keys // 64

    def layer_bytes(self, weight_bytes: int) -> int:
        """Fewest bytes that a layer reads: weights, all index keys, the selected latents."""
        selected = LATENT_BYTES * min(TOPK, self.keys)
        return weight_bytes + self.rows * (INDEX_BYTES * self.keys + selected)

    def layer_flops(self, weight_bytes: int) -> int:
        """Operations of a layer in bfloat16: projections and attention, scores left out."""
        attention = self.heads * min(TOPK, self.keys) * (2 * RANK + ROPE)
        return 2 * self.rows * (weight_bytes // 2 + attention)

    def floor_us(self, weight_bytes: int, ceilings: Mapping[str, float]) -> float:
        """Least time of all layers: of the bytes or of the GEMMs, whichever takes longer."""
        read_s = self.layer_bytes(weight_bytes) / ceilings["copy_bytes_per_s"]
        products_s = self.layer_flops(weight_bytes) / ceilings["matrix_flops_per_s"]
        return LAYERS * max(read_s, products_s) * 1e6


def shapes(heads: Sequence[int], quick: bool = False) -> Iterator[Shape]:
    """All that are timed, the shortest contexts first."""
    if quick:
        yield from (Shape(n, rows, 4096) for n in heads for rows in (1, 32))
        return
    for keys in (4, 32, 128):
        for n in heads:
            for rows in (1, 32, 128):
                yield Shape(n, rows, keys << 10)
