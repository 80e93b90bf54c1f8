"""Sparse MLA by our kernels and by other projects', over the same random caches and selections.

FlashMLA has kernels for 64 and 128 heads: fewer are copied into a query of 64, whose other heads
are zeros, as a server must. Its schedule is made once, before anything is timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import _gpu, _peers
from benchmarks._logits_sides import codes
from custom_ops.build_library import BuildError, build_library
from fd_dsa.attention.device_memory import LOGITS_BYTES
from fd_dsa.cache_formats import LATENT_RECORD_BYTES, LATENT_WIDTH, ROPE_WIDTH
from fd_dsa.ops.mla.custom_op import kind_for
from fd_dsa.ops.mla.records import Dequantized, DequantizedRecords, keys_per_token
from fd_dsa.ops.mla.tensor_core import KernelConfig, Partials, attend_on_tensor_cores, new_partials

import triton  # isort: skip
import triton.language as tl  # isort: skip

TOPK, BLOCK = 2048, 64
RANK, ROPE, RECORD = LATENT_WIDTH, ROPE_WIDTH, LATENT_RECORD_BYTES
SCALE = 0.1352337789
OURS, CUDA, GATHER = "ours", "ours in CUDA C++", "gather alone"
RECORDS = "ours in CUDA C++, from records"
DEVICE = "cuda"


@cache
def _library() -> Path | None:
    """Build the kernels of custom_ops/. Returns None, with a line, if they cannot be built."""
    try:
        return build_library()
    except BuildError as error:
        print(f"custom operators left out: {str(error)[:200]}", flush=True)
        return None


def record_cache(num_slots: int) -> torch.Tensor:
    """Return uint8 [num_slots, 656]: records of random latents."""
    cache = torch.empty(num_slots, RECORD, device=DEVICE, dtype=torch.uint8)
    for part in cache.split(1 << 18):
        part[:, :RANK] = codes(len(part), RANK)
        scales = torch.rand(len(part), 4, device=DEVICE) * 0.5 + 0.5
        part[:, RANK : RANK + 16] = scales.view(torch.uint8)
        rope = torch.randn(len(part), ROPE, device=DEVICE, dtype=torch.bfloat16)
        part[:, RANK + 16 :] = rope.view(torch.uint8)
    return cache


def latents_of(rows: torch.Tensor) -> torch.Tensor:
    """Return float64 [n, 576]: exact values of records or bfloat16 rows."""
    if rows.dtype != torch.uint8:
        return rows.double()
    values = rows[:, :RANK].contiguous().view(torch.float8_e4m3fn).float().double()
    scales = rows[:, RANK : RANK + 16].contiguous().view(torch.float32).double()
    rope = rows[:, RANK + 16 :].contiguous().view(torch.bfloat16).double()
    return torch.cat([(values.view(-1, 4, 128) * scales[:, :, None]).view(-1, RANK), rope], dim=1)


def exact_attention(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Return float64 [heads, 512]: attention of a token's heads over exact latents [n, 576]."""
    return torch.softmax(query.double() @ keys.T * scale, dim=1) @ keys[:, :RANK]


def random_slots(tokens: int, region: int) -> torch.Tensor:
    """Return int32 [tokens, 2048]: distinct slots below `region` in random order."""
    parts = [
        torch.rand(len(part), region, device=DEVICE).topk(TOPK, dim=1, sorted=False).indices
        for part in torch.empty(tokens, device=DEVICE).split(max(1, (1 << 28) // region))
    ]
    return torch.cat(parts).int()


def overlapping_slots(tokens: int, region: int, shared: float = 0.9) -> torch.Tensor:
    """Return int32 [tokens, 2048]: each token has this share of the slots of the one before."""
    order = torch.randperm(region, device=DEVICE, dtype=torch.int32)
    first = torch.arange(tokens, device=DEVICE)[:, None] * round(TOPK * (1 - shared))
    return order[(first + torch.arange(TOPK, device=DEVICE)) % region].contiguous()


@triton.jit
def _gather_kernel(
    cache_ptr,
    slots_ptr,
    out_ptr,
    never,
    WORDS: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Read the rows of some slots, and make nothing of them."""
    slot = tl.load(slots_ptr + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = cache_ptr + slot[:, None] * WORDS
    total = tl.zeros([ROWS, 128], tl.int32)
    for first in tl.static_range(0, WORDS, 128):
        column = first + tl.arange(0, 128)
        total ^= tl.load(row + column[None, :], mask=(column < LAST)[None, :], other=0)
    found = tl.max(tl.max(total, 1), 0)
    if found == never:
        tl.store(out_ptr, found)


class Inputs:
    """Queries and slots of one set, with the cache that they look into.

    Args:
        is_prompt: the tokens are the last ones of a request that has the whole cache.
    """

    def __init__(
        self, cache: torch.Tensor, slots: torch.Tensor, heads: int, is_prompt: bool = False
    ) -> None:
        self.cache, self.slots, self.heads = cache, slots.contiguous(), heads
        self.is_prompt = is_prompt
        shape = len(slots), heads, RANK + ROPE
        self.q = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.1
        self.fp8 = cache.dtype == torch.uint8

    def error(self, out: torch.Tensor) -> float:
        """Return the relative root mean square error of a few tokens against the oracle."""
        tokens = sorted({0, len(self.slots) // 2, len(self.slots) - 1})
        keys = [latents_of(self.cache[self.slots[t].long()]) for t in tokens]
        pairs = zip(tokens, keys, strict=True)
        exact = torch.stack([exact_attention(self.q[t], k, SCALE) for t, k in pairs])
        return float((out[tokens, : self.heads].double() - exact).norm() / exact.norm())

    def gather(self) -> _gpu.Call:
        """Return a call that only reads the selected rows."""
        words = self.cache.view(torch.int32)
        out, rows = torch.zeros(1, device=DEVICE, dtype=torch.int32), 16
        width = words.shape[1]
        grid = (self.slots.numel() // rows,)
        return lambda: _gather_kernel[grid](
            words, self.slots, out, 0x5A5A5A5A, WORDS=width, LAST=width, ROWS=rows, num_warps=4
        )


class Ours:
    """Our launches over memory that all sets share.

    Attributes:
        out, lse: outputs of the launches.
    """

    def __init__(self, tokens: int, heads: int) -> None:
        self.out = torch.empty(tokens, heads, RANK, device=DEVICE, dtype=torch.bfloat16)
        self.lse = torch.empty(tokens, heads, device=DEVICE)
        self.partials = new_partials(heads, _allocate)

    def call(
        self, inputs: Inputs, config: KernelConfig | None = None, splits: int | None = None
    ) -> _gpu.Call:
        """Return a call as served, or with another configuration."""
        partials, rows = self.partials, self.lse.numel() * (splits or 0)
        if rows > len(partials.lse):
            shapes = (rows * RANK,), (rows,)
            partials = Partials(*(_allocate(shape, "float32") for shape in shapes))
        options: dict[str, Any] = {"partials": partials, "config": config, "splits": splits}
        options |= {"softmax_scale": SCALE, "lse": self.lse}
        return lambda: attend_on_tensor_cores(
            inputs.q, inputs.cache, inputs.slots, self.out, **options
        )

    def cuda_calls(self, sets: Sequence[Inputs]) -> dict[str, list[_gpu.Call]]:
        """Return calls of the kernel of custom_ops/ by label, if it serves these heads.

        CUDA dequantises the records of a prompt first where the package does it; then RECORDS is
        the same without.
        """
        first, path = sets[0], _library()
        kind = kind_for(first.heads, first.fp8)
        if kind is None or path is None:
            return {}
        attend, how = kind(ctypes.CDLL(str(path))), {"softmax_scale": SCALE, "lse": self.lse}

        def call(s: Inputs, dequantize: Callable[[], Dequantized | None]) -> _gpu.Call:
            inputs = s.q, s.cache, s.slots, self.out
            return lambda: attend(*inputs, dequantized=dequantize(), **how)

        plain = [call(s, lambda: None) for s in sets]
        if not (first.is_prompt and first.fp8 and not attend.records_alone):
            return {CUDA: plain}
        return {CUDA: [call(s, _dequantizing(s)) for s in sets], RECORDS: plain}


def _dequantizing(inputs: Inputs) -> Callable[[], Dequantized | None]:
    """Make a function that dequantizes the records of a prompt, in memory like a server's."""
    tokens, keys = len(inputs.slots), len(inputs.cache)
    records = DequantizedRecords(
        _allocate((LOGITS_BYTES // 4,), "float32"), keys_per_token(inputs.heads)
    )
    lens = [torch.tensor([n], device=DEVICE).int() for n in (tokens, keys - tokens, tokens)]
    step: Any = SimpleNamespace(
        block_tables=torch.arange(keys // BLOCK, device=DEVICE, dtype=torch.int32)[None],
        seq_lens_encoder=lens[0],
        seq_lens_decoder=lens[1],
        seq_lens_this_time=lens[2],
        batch_id_per_token=torch.zeros(tokens, device=DEVICE, dtype=torch.int32),
    )
    pages = inputs.cache.view(-1, 1, BLOCK, RECORD)
    return lambda: records.fill(pages, step)


def _allocate(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return uninitialised memory of the GPU."""
    return torch.empty(shape, device=DEVICE, dtype=getattr(torch, dtype))


def peer_calls(
    folder: Path | None, sets: list[Inputs], is_decode: bool
) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Return the calls of each peer by label. A call returns [tokens, heads or more, 512]."""
    found: dict[str, list[Callable[[], torch.Tensor]]] = {}
    for label, ops, takes_out in _peers.flash_mla_builds(folder):
        make = _decode_calls if is_decode else _prefill_calls
        try:
            found[label] = make(ops, takes_out, sets)
        except RuntimeError as error:
            print(f"{label} left out: {str(error)[:100]}", flush=True)
    public = _peers.vllm_sparse_mla(folder)
    if public is not None and not sets[0].fp8 and sets[0].heads <= 16:
        found["public Triton"] = [lambda s=s: _public(public, s) for s in sets]
    return found


def _padded(sets: list[Inputs]) -> Callable[[Inputs], torch.Tensor]:
    """Return a function that gives a set's queries with enough heads for FlashMLA."""
    tokens, heads, width = sets[0].q.shape
    if heads in (64, 128):
        return lambda inputs: inputs.q
    wide = torch.zeros(tokens, 64, width, device=DEVICE, dtype=torch.bfloat16)

    def copied(inputs: Inputs) -> torch.Tensor:
        wide[:, :heads].copy_(inputs.q)
        return wide

    return copied


def _decode_calls(ops: Any, takes_out: bool, sets: list[Inputs]) -> list[Callable[[], Any]]:
    """Return calls of FlashMLA over FP8 records, with a batch for each token."""
    query, decode = _padded(sets), partial(_peers.flash_mla_decode, ops, takes_out)

    def run(s: Inputs, schedule: Any) -> Any:
        return decode(query(s), s.cache, s.slots, schedule, SCALE)

    schedule = run(sets[0], (None, None))[1]
    return [lambda s=s: run(s, schedule)[0] for s in sets]


def _prefill_calls(ops: Any, takes_out: bool, sets: list[Inputs]) -> list[Callable[[], Any]]:
    """Return calls of FlashMLA over bfloat16 latents."""
    query, rest = _padded(sets), (None,) if takes_out else ()

    def run(inputs: Inputs) -> Any:
        keys, slots = inputs.cache.unsqueeze(1), inputs.slots.unsqueeze(1)
        return ops.sparse_prefill_fwd(query(inputs), keys, slots, SCALE, RANK, None, None, *rest)[0]

    return [lambda s=s: run(s) for s in sets]


def _public(kernel: Any, inputs: Inputs) -> torch.Tensor:
    """Run vLLM's Triton kernel over bfloat16 latents."""
    return kernel(inputs.q, inputs.cache.unsqueeze(1), inputs.slots.unsqueeze(1), SCALE)[0]
