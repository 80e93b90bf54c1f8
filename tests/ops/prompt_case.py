"""Rows of prompts in pages, and dense attention over them in doubles."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import bfloat16_bits
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import records, softmax, widened

BLOCK, SCALE = 16, 0.2


def rounded(values: np.ndarray) -> np.ndarray:
    """float64 of the bfloat16 numbers nearest to some values."""
    return widened(bfloat16_bits(np.asarray(values, np.float32))).astype(np.float64)


@dataclass
class PromptCase:
    """A step of rows (new tokens, cached tokens, whether it is a prompt).

    What no key of the dense tokens is in holds NaN. GEMM weights are small integers over 8, so that
    keys and values are rounded only once.
    """

    rows: list[tuple[int, int, bool]]
    topk: int
    fp8: bool = False
    heads: int = 2
    nope: int = 16
    values: int = 16
    rank: int = 32
    rope: int = 16
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(4))

    def __post_init__(self) -> None:
        new, cached, is_prompt = (np.array(column) for column in zip(*self.rows, strict=True))
        if self.fp8:
            self.rank, self.rope = 512, 64
        self.new, self.cached = (new * is_prompt).astype(np.int32), cached.astype(np.int32)
        self.this_time = new.astype(np.int32)
        self.starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        gathered = np.where(is_prompt, new + cached, new)
        self.key_starts = np.concatenate([[0], np.cumsum(gathered)]).astype(np.int32)
        row = np.repeat(np.arange(len(new)), new)
        self.positions = np.arange(len(row)) - self.starts[row] + cached[row]
        # first key of each token and the end of its keys, and the windows of prompts
        self.bounds = np.stack([0 * row, self.positions + 1], 1)
        self.windows = self.key_starts[row, None] + self.bounds
        self.windows[~is_prompt[row]] = 0
        width = int(max(-(-(new + cached) // BLOCK)))
        self.tables = self.rng.permutation(width * len(new)).reshape(-1, width).astype(np.int32)
        num_slots, total = width * len(new) * BLOCK, int(new.sum())
        if self.fp8:
            self.cache, latents = records(self.rng, num_slots, self.rank, self.rope)
            # as a norm leaves them
            self.cache[:, 512:528] = np.float32([2.0**-8] * 4).view(np.uint8)
            latents[:, :512] = widened_codes(self.cache[:, :512]) * 2.0**-8
        else:
            self.cache = bfloat16_bits(self.normal(num_slots, self.rank + self.rope))
            latents = widened(self.cache).astype(np.float64)
        self.latents = rounded(latents)
        self.q = bfloat16_bits(self.normal(total, self.heads, self.nope + self.rope))
        angles = self.rng.uniform(0, 6, (total, self.rope // 2))
        self.cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        self.k_b = self.small(self.heads, self.nope, self.rank)
        self.v_b = self.small(self.heads, self.rank, self.values)
        slots = [self.slots(row)[: self.num_keys(row)] for row in range(len(new))]
        unread = np.setdiff1d(np.arange(num_slots), np.concatenate(slots))
        self.cache[unread] = 0xFF if self.fp8 else 0x7FC0

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def small(self, *shape: int) -> np.ndarray:
        return self.rng.integers(-2, 3, shape).astype(np.float32) / 8

    def count(self, row: int) -> int:
        """Tokens of a row that attend densely."""
        return int(np.clip(self.topk - self.cached[row], 0, self.new[row]))

    def num_keys(self, row: int) -> int:
        """Keys that they see."""
        count = self.count(row)
        return int(count + self.cached[row]) if count else 0

    def slots(self, row: int) -> np.ndarray:
        """Slots of a row's blocks, in the order of positions."""
        return (self.tables[row][:, None] * BLOCK + np.arange(BLOCK)).ravel()

    def exact(self, row: int) -> np.ndarray:
        """float64 [dense tokens, heads, values]: attention of a row by definition."""
        first, count = self.starts[row], self.count(row)
        tokens = slice(first, first + count)
        keys = self.latents[self.slots(row)[: self.num_keys(row)]]
        k, v = self.up_projected(keys[:, : self.rank])
        q = widened(self.q[tokens]).astype(np.float64)
        half = self.rope // 2
        cos, sin = (x[:, None].astype(np.float64) for x in np.split(self.cos_sin[tokens], 2, 1))
        a, b = q[..., self.nope :: 2], q[..., self.nope + 1 :: 2]
        turned = np.stack([a * cos - b * sin, b * cos + a * sin], -1)
        turned = rounded(turned.reshape(count, self.heads, 2 * half))
        scores = np.einsum("thd,khd->htk", q[..., : self.nope], k)
        scores += np.einsum("thd,kd->htk", turned, keys[:, self.rank :])
        key, (begin, end) = np.arange(len(keys)), self.bounds[tokens].T[:, :, None]
        empty = (begin >= np.minimum(end, len(keys)))[:, 0]
        seen = (key >= begin) & (key < end)
        scores[:, ~seen & ~empty[:, None]] = -np.inf
        result = np.einsum("htk,khd->thd", softmax(SCALE * scores), v)
        result[empty] = 0
        return result

    def set_window(self, token: int, begin: int, end: int) -> None:
        """Give a token the keys [begin, end) of its row."""
        row = np.searchsorted(self.starts, token, "right") - 1
        self.bounds[token] = begin, end
        self.windows[token] = self.key_starts[row] + begin, self.key_starts[row] + end

    def up_projected(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of every head, [num_keys, heads, width] in bfloat16 numbers."""
        wide = latents.astype(np.float64)
        keys = np.einsum("kr,hdr->khd", wide, self.k_b)
        return rounded(keys), rounded(np.einsum("kr,hrd->khd", wide, self.v_b))

    def step(self, m: KernelMemory) -> Any:
        """Return the fields of the step's metadata that the launches read."""
        return SimpleNamespace(
            seq_lens_encoder=m.put(self.new),
            seq_lens_decoder=m.put(self.cached),
            seq_lens_this_time=m.put(self.this_time),
            cu_seqlens_q=m.put(self.starts),
            position_ids=m.put(self.positions.astype(np.int64)),
            cu_seqlens_kg=m.put(self.key_starts),
            indexer_attn_mask_offsets=m.put(self.windows.astype(np.int32).ravel()),
            num_prefill_tokens=int(self.new.sum()),
            block_tables=m.put(self.tables),
        )

    def pages(self, m: KernelMemory) -> Any:
        """The cache as [blocks, block_size, row]."""
        pages = self.cache.reshape(-1, BLOCK, self.cache.shape[1])
        return m.put(pages) if self.fp8 else m.put(pages.view(np.uint16), "bfloat16")

    def bits(self, m: KernelMemory, array: np.ndarray) -> Any:
        """A bfloat16 tensor of float32 values, or of int16 bits."""
        bits = array if array.dtype == np.int16 else bfloat16_bits(array)
        return m.put(bits.view(np.uint16), "bfloat16")


def widened_codes(codes: np.ndarray) -> np.ndarray:
    """float64 values of e4m3 codes."""
    from tests.ops.e4m3 import E4M3_VALUES

    return E4M3_VALUES[codes].astype(np.float64)
