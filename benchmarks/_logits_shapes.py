"""Steps whose indexer scores are timed, and the least that each must read, write and compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES

WIDTH, PAGE = 128, 64
_SCORE_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """Rows that all have as many keys, the last of them from this step.

    Attributes:
        heads: index heads.
        rows: requests.
        keys: of a row, after the step.
        new: tokens of a row in the step.
        is_prompt: whether they are the last chunk of a prompt.
    """

    heads: int
    rows: int
    keys: int
    new: int = 1
    is_prompt: bool = False

    @property
    def label(self) -> str:
        """The shape in words."""
        keys = f"{self.keys >> 10}k"
        if self.is_prompt:
            return f"prompt, {self.heads} heads, {self.new} of {keys}"
        more = f", {self.new} tokens" if self.new > 1 else ""
        return f"decode, {self.heads} heads, {self.rows} x {keys}{more}"

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return self.rows * self.new

    @property
    def num_pages(self) -> int:
        """Pages of all rows."""
        return self.rows * (self.keys // PAGE)

    @property
    def pairs(self) -> int:
        """Scores: pairs of a token and a key that it sees."""
        return self.rows * (self.new * self.keys - self.new * (self.new - 1) // 2)

    @property
    def bytes_moved(self) -> int:
        """Every key and its scale once, queries and weights once, every score once."""
        queries = self.num_tokens * self.heads * (WIDTH + 4)
        return INDEX_RECORD_BYTES * self.rows * self.keys + queries + _SCORE_BYTES * self.pairs

    @property
    def flops(self) -> int:
        """Multiplications and additions of the GEMMs alone."""
        return 2 * self.heads * WIDTH * self.pairs

    def floor_us(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Least time: of the bytes or of the GEMMs, whichever takes longer."""
        return max(self.bytes_moved / bytes_per_s, self.flops / flops_per_s) * 1e6


def shapes(quick: bool = False) -> Iterator[Shape]:
    """All that are timed: P5 and P6 of the targets, in that order."""
    if quick:
        yield from (Shape(64, 1, 32 << 10, 2048, True), Shape(64, 64, 32 << 10))
        return
    for heads in (64, 32):
        for new, keys in ((2048, 8), (2048, 32), (2048, 64), (4096, 32), (8192, 8), (8192, 64)):
            yield Shape(heads, 1, keys << 10, new, True)
    for rows in (1, 32, 64, 128):
        for keys in (4, 32, 128):
            yield Shape(64, rows, keys << 10)
    for new in (2, 3, 4):
        for rows, keys in ((1, 4), (1, 128), (64, 4), (64, 32), (64, 64)):
            yield Shape(64, rows, keys << 10, new)
    for rows, keys in ((1, 4), (1, 128), (64, 4), (64, 32), (128, 128)):
        yield Shape(32, rows, keys << 10)
