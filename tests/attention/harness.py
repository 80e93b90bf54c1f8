"""Steps through DSAAttentionBackend beside a loop over tokens that selects and attends.

The indexer's inputs are small integers and halves: every score is exact in float32 and bfloat16,
so a selection has one right answer, full of ties. Whatever a row does not own in the caches is
poisoned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

import fd_dsa.attention.host as host_module
from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig, StepHints
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.ops.cache_write import CacheWriteParams
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import ref_array, upper_half
from tests.reference.fp8 import ref_index_key, ref_record
from tests.reference.indexer import ref_score
from tests.reference.sparse_mla import ref_attend
from tests.reference.topk import ref_slot, ref_topk
from tests.strategies import StepBatch

RANK, ROPE, INDEX_DIM = 6, 2, 4
SCALE = 0.4
TOLERANCE = 1e-5
FP8 = "fp8_ds_mla"
# in bytes of 0xFF every code, scale and bfloat16 is NaN; in bytes of 0x70 they are finite and huge
# by flat token the first key that it sees and the end of its keys, as positions of its row
Windows = Mapping[int, tuple[int, int]]
NO_CHANGE: Windows = {}
NAN = {"float32": np.nan, "bfloat16": 0x7FC1, FP8: 0xFF}
HUGE = {"float32": 1e30, "bfloat16": 0x7149, FP8: 0x70}


@dataclass(frozen=True)
class Sizes:
    """Sizes that a backend is made for."""

    topk: int = 8
    block_size: int = 16
    dtype: str = "float32"
    heads: int = 2
    index_heads: int = 3
    layers: int = 1
    # False leaves huge finite numbers in the first block where no row owns it
    poison_first_block: bool = False

    @property
    def widths(self) -> tuple[int, int, int]:
        """kv_lora_rank, qk_rope_head_dim and index_head_dim; fp8_ds_mla has its own alone."""
        return (512, 64, 128) if self.dtype == FP8 else (RANK, ROPE, INDEX_DIM)


@dataclass(frozen=True)
class RowData:
    """Everything that one layer computes of the tokens of one row, by position."""

    q: np.ndarray
    latent: np.ndarray
    k_pe: np.ndarray
    index_q: np.ndarray
    index_k: np.ndarray
    weights: np.ndarray

    @classmethod
    def random(cls, length: int, sizes: Sizes, seed: list[int]) -> RowData:
        """`length` tokens."""
        rng = np.random.default_rng(seed)

        def floats(*shape: int) -> np.ndarray:
            return rng.standard_normal((length, *shape)).astype(np.float32)

        def exact(*shape: int) -> np.ndarray:
            return rng.integers(-2, 3, (length, *shape)).astype(np.float32)

        rank, rope, index_dim = sizes.widths
        # scores of the same spread at any width
        spread = np.float32(3 * ((RANK + ROPE) / (rank + rope)) ** 0.5)
        return cls(
            q=spread * floats(sizes.heads, rank + rope),
            latent=floats(rank),
            k_pe=floats(rope),
            index_q=exact(sizes.index_heads, index_dim),
            index_k=exact(index_dim),
            weights=exact(sizes.index_heads) / 2,
        )

    @cached_property
    def rounded_rows(self) -> np.ndarray:
        """Latent rows as a bfloat16 cache gives them back."""
        return ref_array(np.concatenate([self.latent, self.k_pe], axis=1))

    @cached_property
    def records(self) -> np.ndarray:
        """uint8 [length, 656]: latents in an fp8_ds_mla cache."""
        pairs = zip(self.latent, self.k_pe, strict=True)
        return np.array([ref_record(*pair) for pair in pairs], np.uint8).reshape(-1, 656)

    @cached_property
    def dequantised_rows(self) -> np.ndarray:
        """Latent rows as an fp8_ds_mla cache gives them back."""
        scales = self.records[:, 512:528].copy().view(np.float32)
        latent = E4M3_VALUES[self.records[:, :512]] * np.repeat(scales, 128, axis=1)
        return np.concatenate([latent, ref_array(self.k_pe)], axis=1)

    def rows(self, dtype: str) -> np.ndarray:
        """float32 [length, rank + rope] as the cache gives them back."""
        if dtype == "bfloat16":
            return self.rounded_rows
        if dtype == FP8:
            return self.dequantised_rows
        return np.concatenate([self.latent, self.k_pe], axis=1)

    def selected(self, position: int, topk: int, window: tuple[int, int] | None) -> list[int]:
        """Positions that a token attends to; without a window it sees all up to its own."""
        begin, end = window or (0, position + 1)
        scores = [
            ref_score(self.index_q[position], self.weights[position], key)
            for key in self.index_k[begin:end]
        ]
        return [begin + p for p in ref_topk(scores, len(scores), topk) if p >= 0]

    def attended(
        self, position: int, sizes: Sizes, window: tuple[int, int] | None = None
    ) -> np.ndarray:
        """float64 [heads, RANK]: the token's output, zeros of a token without keys."""
        chosen = self.selected(position, sizes.topk, window)
        rank = sizes.widths[0]
        if not chosen:
            return np.zeros((sizes.heads, rank))
        return ref_attend(self.q[position], self.rows(sizes.dtype), chosen, SCALE, rank)


@dataclass
class Step:
    """Slots and outputs of a step, for each layer by flat token."""

    slots: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class FinishedKeys:
    """A layer whose keys come normed and rotated."""

    layer_id: int

    def cache_write_params(self, layout: CacheLayout) -> CacheWriteParams:
        """See DSAAttentionBackend.write."""
        return CacheWriteParams(
            layout.kv_cache_dtype,
            index_hadamard=layout.index_hadamard,
            index_scale_fmt=layout.index_scale_fmt,
        )


class World:
    """A backend with its caches, and the data of every row by layer.

    Args:
        sizes: of the backend.
        tables: int32 [rows, columns]; the blocks of each row, which no other row shares.
        lengths: tokens of each row for which there is data.
        num_blocks: of the caches; blocks in no table stay poisoned.
        max_tokens: tokens of a step, padding included.
    """

    def __init__(
        self,
        sizes: Sizes,
        tables: np.ndarray,
        lengths: list[int],
        num_blocks: int,
        max_tokens: int,
        seed: int = 0,
    ) -> None:
        self.sizes, self.tables, self.num_blocks = sizes, tables, num_blocks
        self.layout = CacheLayout(sizes.dtype, sizes.block_size, *sizes.widths)
        self.backend = DSAAttentionBackend(
            DSABackendConfig(
                num_heads=sizes.heads,
                index_n_heads=sizes.index_heads,
                index_topk=sizes.topk,
                softmax_scale=SCALE,
                cache_layout=self.layout,
                max_num_seqs=len(tables),
                max_num_tokens=max_tokens,
                max_blocks_per_seq=tables.shape[1],
                num_blocks=num_blocks,
            )
        )
        self.data = [
            [RowData.random(n, sizes, [seed, layer, row]) for row, n in enumerate(lengths)]
            for layer in range(sizes.layers)
        ]
        self.caches: list[Any] = []
        for _ in range(sizes.layers):
            self.caches += [self._poisoned(self.layout.latent_shape(num_blocks))]
            self.caches += [self._poisoned(self.layout.indexer_shape(num_blocks))]

    def _poisoned(self, shape: list[int]) -> Any:
        cache = self.layout.allocate(shape)
        memory = np.from_dlpack(cache)
        memory[...] = NAN[self.sizes.dtype]
        if not self.sizes.poison_first_block:
            memory[0] = HUGE[self.sizes.dtype]
        return cache

    def remember(self, row: int, start: int, end: int, poison: bool = False) -> None:
        """Put positions [start, end) of a row into the caches, or poison them."""
        dtype = self.sizes.dtype
        slots = [ref_slot(p, self.tables[row], self.sizes.block_size) for p in range(start, end)]
        for layer, rows in enumerate(self.data):
            data = rows[row]
            latents, keys = (np.from_dlpack(c) for c in self.caches[2 * layer : 2 * layer + 2])
            if dtype == FP8:
                latents.reshape(-1, 656)[slots] = NAN[FP8] if poison else data.records[start:end]
                for slot, key in zip(slots, data.index_k[start:end], strict=True):
                    put_index_key(keys, slot, None if poison else key)
                continue
            for memory, values in (
                (latents, data.rows(dtype)[start:end]),
                (keys, data.index_k[start:end]),
            ):
                memory = memory.reshape(-1, values.shape[1])
                if poison:
                    memory[slots] = NAN[dtype]
                elif dtype == "bfloat16":
                    memory[slots] = upper_half(values)
                else:
                    memory[slots] = values

    def forward_meta(self, rows: list[tuple[int, int, int]], **more: Any) -> SimpleNamespace:
        """Make what a runner makes of `(encoder, decoder, this_time)` rows."""
        encoder, decoder, this_time = np.array(rows, np.int32).reshape(-1, 3).T.copy()
        return SimpleNamespace(
            seq_lens_encoder=encoder,
            seq_lens_decoder=decoder,
            seq_lens_this_time=this_time,
            block_tables=np.ascontiguousarray(self.tables[: len(rows)]),
            caches=self.caches,
            attn_backend=self.backend,
            **more,
        )

    def begin(self, rows: list[tuple[int, int, int]], padding: int = 0) -> SimpleNamespace:
        """A forward meta with its step metadata, and `padding` tokens after the step's own."""
        meta = self.forward_meta(rows)
        if padding:
            num_tokens = sum(new for _, _, new in rows)
            longest = max((cached + new for _, cached, new in rows if new), default=0)
            prefill = sum(new for new, _, _ in rows)
            self.backend.set_step_hints(
                StepHints(num_tokens, prefill, longest, num_tokens + padding)
            )
        self.backend.init_attention_metadata(meta)
        return meta

    def packed(self, layer: int, rows: list[tuple[int, int, int]], padding: int, name: str) -> Any:
        """A field of RowData for the tokens of a step, NaN in the padding."""
        arrays = [
            getattr(self.data[layer][row], name)[cached : cached + new]
            for row, (_, cached, new) in enumerate(rows)
        ]
        filler = np.full((padding, *arrays[0].shape[1:]), np.nan, np.float32)
        return paddle.to_tensor(np.concatenate([*arrays, filler]))

    def write(self, given: dict[str, Any], layer: int, meta: Any) -> None:
        """The keys of a layer, which come normed and rotated."""
        kv_a = paddle.concat([given["latent"], given["k_pe"]], axis=1)
        self.backend.write(kv_a, given["index_k"], None, FinishedKeys(layer), meta)

    def run(
        self, rows: list[tuple[int, int, int]], padding: int = 0, windows: Windows = NO_CHANGE
    ) -> Step:
        """One step through every layer, with other windows of some prompt tokens."""
        meta, step = self.begin(rows, padding), Step()
        for token, window in windows.items():
            row = meta.fd_dsa_step.batch_id_per_token.numpy()[token]
            start = meta.fd_dsa_step.cu_seqlens_kg.numpy()[row]
            offsets = as_numpy(meta.indexer_attn_mask_offsets)
            offsets[2 * token : 2 * token + 2] = start + np.array(window)
        for layer in range(self.sizes.layers):
            given = {
                name: self.packed(layer, rows, padding, name)
                for name in ("q", "latent", "k_pe", "index_q", "index_k", "weights")
            }
            self.write(given, layer, meta)
            slots = self.backend.select(given["index_q"], given["weights"], layer, meta)
            step.slots.append(slots.numpy())
            out = self.backend.attend(given["q"], slots, layer, meta)
            step.outputs.append(out.numpy())
        return step

    def check(
        self,
        rows: list[tuple[int, int, int]],
        step: Step,
        padding: int = 0,
        only: Any = None,
        windows: Windows = NO_CHANGE,
    ) -> None:
        """Slots exactly and outputs within rounding; `only` limits the flat tokens looked at."""
        tokens = [(row, cached + j) for row, (_, cached, n) in enumerate(rows) for j in range(n)]
        for layer in range(self.sizes.layers):
            slots, outputs = step.slots[layer], step.outputs[layer]
            assert len(slots) == len(outputs) == len(tokens) + padding
            assert (slots[len(tokens) :] == -1).all()
            assert (outputs[len(tokens) :] == 0).all()
            for t in range(len(tokens)) if only is None else only:
                row, position = tokens[t]
                data, window = self.data[layer][row], windows.get(t)
                if window is not None:
                    keys = len(data.index_k)
                    window = max(window[0], 0), min(window[1], keys)
                wanted = [
                    ref_slot(p, self.tables[row], self.sizes.block_size)
                    for p in data.selected(position, self.sizes.topk, window)
                ]
                wanted += [-1] * (slots.shape[1] - len(wanted))
                assert slots[t].tolist() == wanted, (layer, row, position)
                np.testing.assert_allclose(
                    outputs[t], data.attended(position, self.sizes, window), rtol=0, atol=TOLERANCE,
                    err_msg=f"layer {layer}, row {row}, position {position}",
                )  # fmt: skip


def put_index_key(cache: np.ndarray, slot: int, key: np.ndarray | None) -> None:
    """Write a key into its block of codes and scales; None fills its bytes with 0xFF."""
    block, offset = divmod(slot, 64)
    planes = cache[block].reshape(-1)
    codes, scale = planes[128 * offset :][:128], planes[8192 + 4 * offset :][:4]
    if key is None:
        codes[:] = scale[:] = NAN[FP8]
        return
    codes[:], number = ref_index_key(key, "ue8m0")
    scale[:] = np.float32([number]).view(np.uint8)


def world_of(batch: StepBatch, sizes: Sizes, seed: int = 0) -> World:
    """A world in which a batch of `tests.strategies` is one step, its history in the caches."""
    lengths = (batch.seq_lens_decoder + batch.seq_lens_this_time).tolist()
    world = World(
        sizes,
        batch.block_tables,
        lengths,
        batch.num_blocks,
        max(1, batch.num_tokens, batch.num_padded_tokens or 0),
        seed,
    )
    for row, cached in enumerate(batch.seq_lens_decoder.tolist()):
        world.remember(row, 0, cached)
    return world


def rows_of(batch: StepBatch) -> list[tuple[int, int, int]]:
    """A batch as `(encoder, decoder, this_time)` rows."""
    return [tuple(row) for row in np.stack(batch.inputs()[:3], axis=1).tolist()]


def record_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that every StepPlan which a backend makes from now on joins."""
    plans: list[Any] = []
    original = host_module.StepPlan

    def recording(*args: Any, **kwargs: Any) -> Any:
        plans.append(original(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(host_module, "StepPlan", recording)
    return plans
