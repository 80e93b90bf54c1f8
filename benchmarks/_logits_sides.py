"""A step of random queries over random pages, scored by our kernels and by DeepGEMM."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks._gpu import Call
from benchmarks._logits_shapes import PAGE, WIDTH, Shape
from benchmarks._peers import DeepGemm
from fd_dsa.ops.logits.tile_forms import TileForm, decode_form, prompt_form
from fd_dsa.ops.logits.tile_kernel import score_tiles
from fd_dsa.ops.logits.tile_schedule import TileSchedule, fill_tile_schedule

DEVICE = "cuda"
# 2.2 GB: the largest shape has as many keys
NUM_BLOCKS = (128 << 17) // PAGE
_CHECKED_TOKENS = 8


def codes(*shape: int) -> torch.Tensor:
    """uint8 bits of random e4m3 numbers, N(0, 1)."""
    return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn).view(torch.uint8)


def random_cache(num_blocks: int = NUM_BLOCKS) -> torch.Tensor:
    """uint8 [num_blocks, 64, 132]: blocks of random keys, then their scales."""
    cache = torch.empty(num_blocks, PAGE * (WIDTH + 4), device=DEVICE, dtype=torch.uint8)
    for part in cache.split(1 << 13):
        part[:, : PAGE * WIDTH] = codes(len(part), PAGE * WIDTH)
        scales = torch.rand(len(part), PAGE, device=DEVICE) * 0.02 + 0.005
        part[:, PAGE * WIDTH :] = scales.view(torch.uint8)
    return cache.view(num_blocks, PAGE, WIDTH + 4)


def form_of(shape: Shape) -> TileForm:
    """The form of the tile kernel that serves a shape."""
    return prompt_form(shape.heads) if shape.is_prompt else decode_form(shape.heads, shape.new)


def keys_of(cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys e4m3 [n, 128] of some blocks of a cache, and their float32 scales [n]."""
    pages = cache.view(len(cache), -1)[blocks.long()]
    keys = pages[:, : PAGE * WIDTH].reshape(-1, WIDTH).view(torch.float8_e4m3fn)
    return keys, pages[:, PAGE * WIDTH :].contiguous().view(torch.float32).flatten()


class Step:
    """A step of a shape in random pages of a cache.

    Args:
        logits: memory for scores that all steps share, at least as many as the shape has.

    Attributes:
        logits: float32 [num_tokens, keys] in it.
    """

    def __init__(self, shape: Shape, cache: torch.Tensor, logits: torch.Tensor, seed: int) -> None:
        self.shape, self.cache = shape, cache
        blocks = np.random.default_rng(seed).choice(NUM_BLOCKS, shape.num_pages, replace=False)
        self.tables = self._int32(blocks.reshape(shape.rows, -1))
        first = shape.keys - shape.new
        positions = np.tile(np.arange(first, shape.keys), shape.rows)
        self.positions = torch.from_numpy(positions).to(DEVICE)
        self.batch = self._int32(np.repeat(np.arange(shape.rows), shape.new))
        self.cu = self._int32(np.arange(shape.rows + 1) * shape.new)
        self.q = codes(shape.num_tokens, shape.heads, WIDTH)
        self.weights = torch.randn(shape.num_tokens, shape.heads, device=DEVICE)
        self.logits = logits[: shape.num_tokens * shape.keys].view(shape.num_tokens, shape.keys)

    @staticmethod
    def _int32(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(DEVICE)

    def schedule(self, form: TileForm) -> tuple[TileSchedule, Call]:
        """A filled schedule of a form, and the call that fills it."""
        processors = torch.cuda.get_device_properties(0).multi_processor_count

        def allocate(size: tuple[int, ...], dtype: str) -> torch.Tensor:
            return torch.empty(size, device=DEVICE, dtype=getattr(torch, dtype))

        programs = processors * form.programs_per_processor
        schedule = TileSchedule.allocate(self.shape.num_tokens, 1, programs, allocate)

        def fill() -> None:
            tensors = self.positions, self.batch, self.cu
            fill_tile_schedule(schedule, *tensors, form=form, max_keys=self.shape.keys)

        fill()
        return schedule, fill

    def ours(self, form: TileForm) -> Call:
        """Our launch, its schedule made beforehand."""
        schedule, _ = self.schedule(form)
        rest = (self.positions, self.tables, schedule, self.logits)
        return lambda: score_tiles(self.q, self.weights, self.cache, *rest, form=form)

    def wanted(self, token: int) -> torch.Tensor:
        """float64 [keys]: the scores of a token, in doubles."""
        row = token // self.shape.new
        keys, scales = keys_of(self.cache, self.tables[row])
        q = self.q[token].view(torch.float8_e4m3fn).double()
        return (self.weights[token].double() @ (q @ keys.double().T).relu_()) * scales.double()

    def error(self, scores: torch.Tensor) -> float:
        """Largest relative root mean square error of some tokens' scores in their windows."""
        tokens = np.linspace(0, self.shape.num_tokens - 1, _CHECKED_TOKENS).astype(int)
        worst = 0.0
        for token in map(int, tokens):
            window = int(self.positions[token]) + 1
            wanted = self.wanted(token)[:window]
            found = scores[token, :window].double()
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
        return worst


class Peer:
    """DeepGEMM's kernels for a step: of gathered keys for a prompt, of pages else.

    Its schedule is made beforehand, as ours is, and so are gathered keys. Rows of 3 tokens, which
    it does not take, are rows of 1 to it.
    """

    def __init__(self, gemm: DeepGemm) -> None:
        self._gemm = gemm

    def call(self, step: Step) -> Call:
        """A call that returns float32 [num_tokens, keys or more]."""
        return self._of_prompt(step) if step.shape.is_prompt else self._of_pages(step)

    def _of_prompt(self, step: Step) -> Call:
        keys = keys_of(step.cache, step.tables[0])
        windows = torch.zeros_like(step.batch), (step.positions + 1).int()
        q = step.q.view(torch.float8_e4m3fn)
        return lambda: self._gemm.score_gathered(q, keys, step.weights, *windows)

    def _of_pages(self, step: Step) -> Call:
        shape = step.shape
        new = 1 if shape.new == 3 else shape.new
        lengths = (step.positions + 1).int().view(-1, new)
        tables = step.tables.repeat_interleave(shape.new // new, 0)
        rest = step.weights, lengths, tables, self._gemm.schedule(lengths), shape.keys
        q = step.q.view(torch.float8_e4m3fn)
        return lambda: self._gemm.score_pages(q, step.cache, *rest)
