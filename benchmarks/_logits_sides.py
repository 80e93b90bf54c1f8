"""Steps whose indexer scores are timed: random queries over random pages, by us and by DeepGEMM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks._gpu import Call
from benchmarks._peers import DeepGemm
from fd_dsa.cache_formats import INDEX_RECORD_BYTES
from fd_dsa.ops.logits.tile_configs import TileConfig, decode_config, prompt_config
from fd_dsa.ops.logits.tile_kernel import score_tiles
from fd_dsa.ops.logits.tile_schedule import TileSchedule

DEVICE = "cuda"
WIDTH, PAGE = 128, 64
# 2.2 GB: the largest shape has as many keys
NUM_BLOCKS = (128 << 17) // PAGE
_CHECKED_TOKENS = 8
_SCORE_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """Rows that all have as many keys, the last of them from this step.

    Attributes:
        heads: index heads.
        rows: requests.
        keys: number of keys of a row after the step.
        new: number of tokens of a row in the step.
        is_prompt: True if they are the last chunk of a prompt.
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
        """Return the least time: of the bytes or of the GEMMs, whichever takes longer."""
        return max(self.bytes_moved / bytes_per_s, self.flops / flops_per_s) * 1e6


def shapes(quick: bool = False) -> Iterator[Shape]:
    """Yield all timed shapes: P5 and P6 of the targets, in that order."""
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


def codes(*shape: int) -> torch.Tensor:
    """Return uint8 bits of random e4m3 numbers, N(0, 1)."""
    return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8)


def random_cache(num_blocks: int = NUM_BLOCKS) -> torch.Tensor:
    """Return uint8 [num_blocks, 64, 132]: blocks of random keys, then their scales."""
    cache = torch.empty(num_blocks, PAGE * (WIDTH + 4), device=DEVICE, dtype=torch.uint8)
    for part in cache.split(1 << 13):
        part[:, : PAGE * WIDTH] = codes(len(part), PAGE * WIDTH)
        scales = torch.rand(len(part), PAGE, device=DEVICE) * 0.02 + 0.005
        part[:, PAGE * WIDTH :] = scales.view(torch.uint8)
    return cache.view(num_blocks, PAGE, WIDTH + 4)


def config_of(shape: Shape) -> TileConfig:
    """Return the configuration of the tile kernel that serves a shape."""
    return prompt_config(shape.heads) if shape.is_prompt else decode_config(shape.heads, shape.new)


def keys_of(cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys e4m3 [n, 128] of some blocks of a cache, and their float32 scales [n]."""
    pages = cache.view(len(cache), -1)[blocks.long()]
    keys = pages[:, : PAGE * WIDTH].reshape(-1, WIDTH).view(torch.float8_e4m3fn)
    return keys, pages[:, PAGE * WIDTH :].contiguous().view(torch.float32).flatten()


def exact_scores(
    q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """Return float64 [n]: the scores of a token over the keys of some blocks, in doubles.

    Args:
        q: e4m3 bits [heads, 128].
        weights: float32 [heads].
    """
    keys, scales = keys_of(cache, blocks)
    products = (q.view(torch.float8_e4m3fn).double() @ keys.double().T).relu_()
    return (weights.double() @ products) * scales.double()


class Step:
    """A step of a shape in random pages of a cache.

    Args:
        logits: memory for scores that all steps share, at least as many as the shape has.

    Attributes:
        position_ids, batch_id_per_token, cu_seqlens_q, block_tables, seq_lens_encoder,
            cu_seqlens_kg, indexer_attn_mask_offsets, num_prefill_tokens: as of a ForwardMeta.
        logits: float32 [num_tokens, keys] in it.
    """

    def __init__(self, shape: Shape, cache: torch.Tensor, logits: torch.Tensor, seed: int) -> None:
        self.shape, self.cache = shape, cache
        blocks = np.random.default_rng(seed).choice(NUM_BLOCKS, shape.num_pages, replace=False)
        self.block_tables = self._int32(blocks.reshape(shape.rows, -1))
        first = shape.keys - shape.new
        positions = np.tile(np.arange(first, shape.keys), shape.rows)
        self.position_ids = torch.from_numpy(positions).to(DEVICE)
        self.batch_id_per_token = self._int32(np.repeat(np.arange(shape.rows), shape.new))
        self.cu_seqlens_q = self._int32(np.arange(shape.rows + 1) * shape.new)
        self.num_prefill_tokens = shape.num_tokens if shape.is_prompt else 0
        self.seq_lens_encoder = self._int32(np.full(shape.rows, shape.new * shape.is_prompt))
        self.cu_seqlens_kg = self.indexer_attn_mask_offsets = None
        if shape.is_prompt:
            starts = np.arange(shape.rows + 1) * shape.keys
            windows = np.stack([0 * positions, positions + 1], 1)
            windows += np.repeat(starts[:-1], shape.new)[:, None]
            self.cu_seqlens_kg = self._int32(starts)
            self.indexer_attn_mask_offsets = self._int32(windows.ravel())
        self.q = codes(shape.num_tokens, shape.heads, WIDTH)
        self.weights = torch.randn(shape.num_tokens, shape.heads, device=DEVICE)
        self.logits = logits[: shape.num_tokens * shape.keys].view(shape.num_tokens, shape.keys)

    @staticmethod
    def _int32(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(DEVICE)

    def ours(self, config: TileConfig) -> Call:
        """Return our launch with a finished schedule."""
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        schedule = TileSchedule.allocate(
            config,
            self.shape.num_tokens,
            1,
            processors * config.programs_per_processor,
            lambda size, dtype: torch.empty(size, device=DEVICE, dtype=getattr(torch, dtype)),
        )
        schedule.fill(self, self.shape.keys)
        inputs = self.q, self.weights, self.cache
        return lambda: score_tiles(*inputs, self, schedule, self.logits)

    def error(self, scores: torch.Tensor) -> float:
        """Return the largest relative error (root mean square) of some tokens' scores."""
        tokens = np.linspace(0, self.shape.num_tokens - 1, _CHECKED_TOKENS).astype(int)
        worst = 0.0
        for token in map(int, tokens):
            window = int(self.position_ids[token]) + 1
            table = self.block_tables[token // self.shape.new]
            wanted = exact_scores(self.q[token], self.weights[token], self.cache, table)[:window]
            found = scores[token, :window].double()
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
        return worst


def peer_call(gemm: DeepGemm, step: Step) -> Call:
    """Return DeepGEMM's call for a step, which returns float32 [num_tokens, keys or more].

    It scores gathered keys for a prompt, pages else. Its schedule is made beforehand, as ours is,
    and so are gathered keys. Rows of 3 tokens, which it does not take, are rows of 1 to it.
    """
    shape, q = step.shape, step.q.view(torch.float8_e4m3fn)
    if shape.is_prompt:
        keys = keys_of(step.cache, step.block_tables[0])
        windows = torch.zeros_like(step.batch_id_per_token), (step.position_ids + 1).int()
        return lambda: gemm.score_gathered(q, keys, step.weights, *windows)
    new = 1 if shape.new == 3 else shape.new
    lengths = (step.position_ids + 1).int().view(-1, new)
    tables = step.block_tables.repeat_interleave(shape.new // new, 0)
    rest = step.weights, lengths, tables, gemm.schedule(lengths), shape.keys
    return lambda: gemm.score_pages(q, step.cache, *rest)
