"""Random steps for the kernels of indexer scores, in any memory, and what is right for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import bfloat16_bits
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.ops.paged_rows import PagedRows
from tests.ops.tensor_core_case import widened

POISONED = np.full(4, POISON, np.uint8).view(np.float32)[0]
# an error as a share of sum_h |w| |q| |k|; tensor cores sum FP8 products with fewer bits
TOLERANCE, ON_TENSOR_CORES = 1e-6, 2e-4
FP8, CODES, DIM = "fp8_ds_mla", ("uint8", "float8_e4m3fn"), 128
NAN_BITS = {"float32": np.nan, "bfloat16": 0x7FC0, "int16": 0x7FC0}
_NAN = 0x7F


def random_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8: e4m3 codes of every number, none of NaN."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == _NAN] = 0
    return codes


def fp8_cache(rng: np.random.Generator, step: PagedRows, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [num_blocks, block_size, dim + 4] block-planar, and its values; NaN where unseen."""
    size = step.block_size
    keys = random_codes(rng, (step.num_blocks * size, dim))
    scales = np.exp2(rng.integers(-3, 4, len(keys))).astype(np.float32)
    unseen = np.setdiff1d(np.arange(len(keys)), step.seen_slots())
    keys[unseen], scales[unseen] = _NAN, np.nan
    cache = np.empty((step.num_blocks, size * (dim + 4)), np.uint8)
    cache[:, : size * dim] = keys.reshape(step.num_blocks, -1)
    cache[:, size * dim :] = scales.view(np.uint8).reshape(step.num_blocks, -1)
    values = E4M3_VALUES[keys].astype(np.float64) * scales[:, None]
    return cache.reshape(step.num_blocks, size, dim + 4), values


@dataclass
class Case:
    """One step's queries and cache: as stored, and as float64 values.

    Attributes:
        q_stored, weights, cache: what the kernel gets.
        q, keys: values; keys is [num_slots, dim].
    """

    step: PagedRows
    q_dtype: str
    cache_dtype: str
    q_stored: np.ndarray
    weights: np.ndarray
    cache: np.ndarray
    q: np.ndarray
    keys: np.ndarray

    def inputs(self, m: KernelMemory) -> list[Any]:
        """Queries, weights and cache in a memory."""
        narrow = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}
        stored = (self.q_stored, self.q_dtype), (self.weights, ""), (self.cache, self.cache_dtype)
        return [
            m.put(x.view(narrow[dtype]), dtype) if dtype in narrow else m.put(x)
            for x, dtype in stored
        ]

    def wanted(self, token: int) -> np.ndarray:
        """float64 [window]; the oracle's scores of a token."""
        dots = self.q[token] @ self.keys[self.step.key_slots(token)].T
        return self.weights[token].astype(np.float64) @ np.maximum(dots, 0.0)

    def magnitude(self, token: int) -> np.ndarray:
        """float64 [window]; what an error is a share of."""
        dots = np.abs(self.q[token]) @ np.abs(self.keys[self.step.key_slots(token)]).T
        return np.abs(self.weights[token].astype(np.float64)) @ dots


def make(
    step: PagedRows,
    q_dtype: str = "uint8",
    cache_dtype: str = FP8,
    *,
    heads: int = 5,
    dim: int = DIM,
) -> Case:
    """Random queries and keys; NaN in every slot that no token sees."""
    rng = np.random.default_rng(0)
    shape = (step.num_tokens, heads, dim)
    weights = rng.standard_normal(shape[:2]).astype(np.float32)
    if q_dtype in CODES:
        stored = random_codes(rng, shape)
        q = E4M3_VALUES[stored]
    else:
        q = stored = rng.standard_normal(shape).astype(np.float32)
        if q_dtype == "bfloat16":
            stored = bfloat16_bits(q)
            q = widened(stored)
    if cache_dtype == FP8:
        cache, keys = fp8_cache(rng, step, dim)
    else:
        keys = rng.standard_normal((step.num_blocks * step.block_size, dim)).astype(np.float32)
        cache = keys if cache_dtype == "float32" else bfloat16_bits(keys)
        keys = keys.copy() if cache_dtype == "float32" else widened(cache)
        cache[np.setdiff1d(np.arange(len(keys)), step.seen_slots())] = NAN_BITS[cache_dtype]
        cache = cache.reshape(step.num_blocks, step.block_size, dim)
    return Case(step, q_dtype, cache_dtype, stored, weights, cache, q.astype(float), keys)


class Scorer:
    """A case in a memory, with poisoned scores of all its tokens, and a schedule for tiles.

    Args:
        kernel: "pages" or "tiles".
        form: first and other tokens of a tile.
        chunk_tokens: tokens scored in a launch; None = all.
        num_programs: that the pages are shared out to.
        least: as `min_keys` of the schedule.
        width: of the scores; None = three more than the longest window.
    """

    def __init__(
        self,
        m: KernelMemory,
        case: Case,
        kernel: str = "tiles",
        form: tuple[int, int] = (2, 2),
        *,
        chunk_tokens: int | None = None,
        num_programs: int = 5,
        least: int = 0,
        width: int | None = None,
    ) -> None:
        from fd_dsa.ops.logits.tile_configs import TileConfig
        from fd_dsa.ops.logits.tile_schedule import TileSchedule

        step, self.m, self.least = case.step, m, least
        self.case, self.is_tiled, tokens = case, kernel == "tiles", step.num_tokens
        self.chunk_tokens = chunk_tokens or tokens
        chunks = -(-tokens // self.chunk_tokens)
        sizes = TileConfig(*form, num_stages=3), tokens, chunks, num_programs
        self.schedule = TileSchedule.allocate(*sizes, m.poisoned)
        self.logits = m.poisoned(
            (tokens, width or int((step.first + step.window).max()) + 3), "float32"
        )
        self.inputs, self.meta = case.inputs(m), step.meta(m)

    def fill(self) -> None:
        """Make the schedule."""
        self.schedule.fill(self.meta, self.logits.shape[1], self.chunk_tokens, self.least)

    def score(self, chunk: int = 0, logits: Any = None, first: int | None = None) -> None:
        """Launch for one chunk; into other rows, or from another token on, where asked for."""
        from fd_dsa.ops.logits.tile_kernel import score_tiles
        from fd_dsa.ops.logits.triton_kernel import score_pages

        first = chunk * self.chunk_tokens if first is None else first
        if logits is None:
            logits = self.logits[first : first + self.chunk_tokens]
        if self.is_tiled:
            options = {"first_token": first, "chunk": chunk}
            score_tiles(*self.inputs, self.meta, self.schedule, logits, **options)
        else:
            score_pages(*self.inputs, self.meta, logits, first)

    def run(self) -> np.ndarray:
        """Scores of all chunks; poison where nothing was written."""
        if self.is_tiled:
            self.fill()
        for chunk in range(-(-self.case.step.num_tokens // self.chunk_tokens)):
            self.score(chunk)
        return self.m.get(self.logits)

    def check(self, found: np.ndarray | None = None, scored: Any = None) -> None:
        """Every seen score within the tolerance, every other entry as it was."""
        found = self.run() if found is None else found
        for token, line in enumerate(found):
            first, window = self.case.step.first[token], self.case.step.window[token]
            if scored is not None and not scored[token]:
                window = 0
            seen = np.arange(first, first + window)
            rest = np.delete(line, seen)
            assert (rest == POISONED).all(), f"token {token} wrote outside of its window"
            if window:
                self.check_keys(line[seen], token, np.arange(window))

    def check_keys(self, line: np.ndarray, token: int, keys: np.ndarray) -> None:
        """A token's scores of some keys of its window, which begins in column 0 of `line`.

        On tensor cores by the root mean square of errors.
        """
        error = np.abs(line[keys] - self.case.wanted(token)[keys])
        bound = self.case.magnitude(token)[keys]
        if self.is_tiled and self.m.on_gpu:
            assert np.linalg.norm(error) <= ON_TENSOR_CORES * np.linalg.norm(bound), token
        else:
            assert (error <= TOLERANCE * bound + 1e-30).all(), f"token {token}"
