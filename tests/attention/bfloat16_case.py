"""Steps of bfloat16 activations over fp8_ds_mla caches, as an adapter to FastDeploy runs them.

Device tensors in, counts as upper bounds, padding after the tokens; keys come as projected and
are normed and rotated by the write. What a CPU makes of the same numbers says what the caches and
queries must be, to the byte; selections and outputs are held against the loops of tests/reference.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig, StepHints
from fd_dsa.ops.cache_write import CacheWriteParams, bfloat16_bits, write_caches
from fd_dsa.ops.cache_write import write_on_host as cpu_cache_write
from fd_dsa.ops.mla_query import prepare_mla_query
from fd_dsa.ops.mla_query import prepare_on_host as cpu_mla_query
from fd_dsa.ops.query import prepare_on_host as cpu_indexer_query
from fd_dsa.ops.query_kernels import prepare_indexer_query
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import widened
from tests.reference.sparse_mla import ref_attend
from tests.reference.topk import ref_slot
from tests.strategies import StepBatch

RANK, ROPE, DIM, BLOCK = 512, 64, 128, 64
SCALE = 0.06
PADDING = 2
# weights, latents and the output are rounded to bfloat16; an interpreter cuts off instead
TOLERANCE = {True: 2**-7, False: 2**-5}
NORMS = ("kv_norm_weight", "k_norm_weight", "k_norm_bias")
Rows = list[tuple[int, int, int]]


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 numbers that bfloat16 has."""
    return widened(bfloat16_bits(values))


@dataclass(frozen=True)
class Tokens:
    """Projections of a layer for some tokens: float32 values of bfloat16 numbers."""

    kv_a: np.ndarray
    index_k: np.ndarray
    index_q: np.ndarray
    weights: np.ndarray
    q_latent: np.ndarray
    q_pe: np.ndarray

    @classmethod
    def random(cls, count: int, heads: int, index_heads: int, seed: list[int]) -> Tokens:
        """`count` tokens."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rounded(rng.standard_normal((count, *shape)).astype(np.float32))

        return cls(
            normal(RANK + ROPE), normal(DIM), normal(index_heads, DIM), normal(index_heads),
            normal(heads, RANK), normal(heads, ROPE),
        )  # fmt: skip


class Bfloat16World:
    """A backend in a memory, its caches of one layer, and the data of every row by position.

    Args:
        m: memory of the backend.
        batch: its rows are those of the step; a CPU writes the tokens that are in the cache before.
        heads, index_heads, topk: of the backend.
    """

    def __init__(
        self, m: KernelMemory, batch: StepBatch, heads: int, index_heads: int = 4, topk: int = 4
    ) -> None:
        self.m, self.batch, self.topk = m, batch, topk
        self.heads, self.index_heads = heads, index_heads
        self.lengths = (batch.seq_lens_decoder + batch.seq_lens_this_time).tolist()
        layout = CacheLayout("fp8_ds_mla", BLOCK, RANK, ROPE, DIM)
        cached = int(batch.seq_lens_decoder.sum())
        most = max(batch.num_tokens, cached) + PADDING
        columns = batch.block_tables.shape[1]
        config = DSABackendConfig(
            heads, index_heads, topk, SCALE, layout, batch.num_rows, most, columns,
            batch.num_blocks, dtype="bfloat16",
        )  # fmt: skip
        device = "gpu" if m.name != "rig" else "hopper:0"
        self.backend = DSAAttentionBackend(config, device, m.poisoned)
        self.data = [
            Tokens.random(n, heads, index_heads, [row]) for row, n in enumerate(self.lengths)
        ]
        angles = np.random.default_rng(1).uniform(-3, 3, (columns * BLOCK, ROPE // 2))
        self.table = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        norms = np.random.default_rng(2).uniform(0.5, 1.5, (3, RANK)).astype(np.float32)
        self.norms = dict(zip(NORMS, (norms[0], norms[1, :DIM], norms[2, :DIM] - 1), strict=True))
        self._cpu = StepMetadataBuilder(batch.num_rows, most, columns, BLOCK, device="numpy")
        # in bytes of 0xFF every code, scale and bfloat16 is NaN
        shapes = layout.latent_shape(batch.num_blocks), layout.indexer_shape(batch.num_blocks)
        self.wanted = [np.full(shape, 0xFF, np.uint8) for shape in shapes]
        self.write_wanted([(int(n), 0, int(n)) for n in batch.seq_lens_decoder])
        self.caches = [m.put(cache) for cache in self.wanted]
        self.table_on_device = m.put(self.table)
        self.device_params = CacheWriteParams(
            "fp8_ds_mla", **{name: m.put(value) for name, value in self.norms.items()}
        )

    def write_wanted(self, rows: Rows) -> None:
        """Write the keys of a step to the caches that are wanted."""
        meta = self.metadata(rows)
        cpu_cache_write(
            self.packed(rows, "kv_a"), self.packed(rows, "index_k"), meta.position_ids,
            meta.slot_mapping, self.table, *self.wanted,
            CacheWriteParams("fp8_ds_mla", **self.norms),
        )  # fmt: skip

    @property
    def rows(self) -> Rows:
        """The batch itself."""
        return [tuple(row) for row in np.stack(self.batch.inputs()[:3], axis=1).tolist()]

    def step(self, rows: Rows) -> Bfloat16Step:
        """Run a step of `(encoder, decoder, this_time)` rows through the layer."""
        return Bfloat16Step(self, rows).run()

    def inputs(self, rows: Rows) -> list[np.ndarray]:
        """The four arrays of a step."""
        lengths = np.ascontiguousarray(np.array(rows, np.int32).reshape(-1, 3).T)
        return [*lengths, self.batch.block_tables]

    def metadata(self, rows: Rows) -> ForwardMeta:
        """The step's arrays as NumPy has them."""
        return self._cpu.build(*self.inputs(rows))

    def hints(self, rows: Rows, padding: int = PADDING) -> StepHints:
        """Upper bounds, as of a runner that does not look at its lengths."""
        most = sum(new for _, _, new in rows) + padding
        prefill = most if any(new for new, _, _ in rows) else 0
        return StepHints(most, prefill, self.batch.block_tables.shape[1] * BLOCK)

    def packed(self, rows: Rows, name: str) -> np.ndarray:
        """A field of Tokens for the tokens of a step, in order."""
        parts = [
            getattr(self.data[row], name)[cached : cached + new]
            for row, (_, cached, new) in enumerate(rows)
        ]
        return np.concatenate(parts)


class Bfloat16Step:
    """One step of a world: `run`, or its parts in a graph; then `check`.

    Args:
        world: its backend and caches.
        rows: `(encoder, decoder, this_time)` of each row.
        padding: tokens of the inputs after those of the rows.
    """

    def __init__(self, world: Bfloat16World, rows: Rows, padding: int = PADDING) -> None:
        self.world, self.rows, self.padding = world, rows, padding
        self.num_tokens = sum(new for _, _, new in rows)
        self.meta = SimpleNamespace(caches=world.caches)
        self.results: dict[str, Any] = {}

    def run(self) -> Bfloat16Step:
        """All of it."""
        self.build(self.world.hints(self.rows, self.padding))
        self.layer(self.meta, self.given())
        return self

    def build(self, hints: StepHints, inputs: list[Any] | None = None) -> None:
        """The metadata, from tensors of the memory."""
        tensors = inputs or [self.world.m.put(array) for array in self.world.inputs(self.rows)]
        self.world.backend.build_step(self.meta, tensors, hints)

    def given(self) -> dict[str, Any]:
        """The outputs of the layer's projections: bfloat16 tensors, NaN after the tokens.

        Keys are columns of wider rows, as a fused projection leaves them: those are there as
        "whole kv_a" and "whole index_k".
        """
        found = {}
        for field in fields(Tokens):
            array = self.world.packed(self.rows, field.name)
            filler = np.full((self.padding, *array.shape[1:]), np.nan, np.float32)
            bits = bfloat16_bits(np.concatenate([array, filler]))
            if field.name in ("kv_a", "index_k"):
                wide = np.concatenate([bits[:, :32], bits, bits[:, :96]], axis=1)
                whole = self.world.m.put(wide.view(np.uint16), "bfloat16")
                found[f"whole {field.name}"] = whole
                found[field.name] = whole[:, 32 : 32 + array.shape[1]]
            else:
                found[field.name] = self.world.m.put(bits.view(np.uint16), "bfloat16")
        return found

    def layer(self, meta: Any, given: dict[str, Any]) -> None:
        """The layer on the step that `meta` holds; results are in the backend's buffers."""
        world, step, table = self.world, meta.fd_dsa_step, self.world.table_on_device
        backend, num_tokens = world.backend, given["weights"].shape[0]
        write_caches(
            given["kv_a"], given["index_k"], step.position_ids, step.slot_mapping, table,
            *world.caches, world.device_params,
        )  # fmt: skip
        index_q, weights = prepare_indexer_query(
            given["index_q"], given["weights"], step.position_ids, table,
            rope_interleave=False, quantized=True, weights_scale=0.03,
            out=backend.attention.query_buffers(num_tokens),
        )  # fmt: skip
        slots = backend.select(index_q, weights, 0, meta)
        buffer = backend.attention.mla_query_buffer(num_tokens)
        q = prepare_mla_query(given["q_latent"], given["q_pe"], step.position_ids, table, buffer)
        out = backend.attend(q, slots, 0, meta)
        self.results = {"index_q": index_q, "weights": weights, "slots": slots, "q": q, "out": out}

    def check(self) -> None:
        """Caches and queries to the byte, selections by their scores, outputs within rounding."""
        self.check_bytes()
        tokens = [(r, cached + j) for r, (_, cached, n) in enumerate(self.rows) for j in range(n)]
        get = self.world.m.get
        slots, outputs = get(self.results["slots"]), get(self.results["out"])
        assert outputs.dtype == np.uint16, "the result is bfloat16"
        assert (slots[self.num_tokens :] == -1).all()
        assert not outputs[self.num_tokens :].any()
        for t, (row, position) in enumerate(tokens):
            self.check_selection(t, row, position, slots[t].tolist())
            self.check_output(t, slots[t][slots[t] >= 0].tolist(), widened(outputs[t]))

    def check_bytes(self) -> None:
        """Compare with a CPU's result of the same float32 numbers."""
        world, get = self.world, self.world.m.get
        given = self.cpu_queries
        world.write_wanted(self.rows)
        for found, cache in zip(world.caches, world.wanted, strict=True):
            np.testing.assert_array_equal(get(found), cache)
        n = self.num_tokens
        for name, wanted in zip(("index_q", "weights", "q"), given, strict=True):
            np.testing.assert_array_equal(get(self.results[name])[:n], wanted, err_msg=name)

    @cached_property
    def cpu_queries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes and head weights of the indexer, and the bits of the attention's queries."""
        world, positions = self.world, self.world.metadata(self.rows).position_ids.copy()
        q = world.packed(self.rows, "index_q").copy()
        out = np.empty(q.shape, np.uint8), np.empty(q.shape[:2], np.float32)
        cpu_indexer_query(
            q, world.packed(self.rows, "weights"), positions, world.table, rope_interleave=False,
            quantized=True, hadamard=False, scale_fmt="ue8m0", weights_scale=0.03, out=out,
        )  # fmt: skip
        parts = (world.packed(self.rows, name) for name in ("q_latent", "q_pe"))
        query = cpu_mla_query(*parts, positions, world.table, None)
        return *out, bfloat16_bits(query).view(np.uint16)

    def check_selection(self, t: int, row: int, position: int, found: list[int]) -> None:
        """The token's best keys in order; keys whose scores are within rounding may swap."""
        world, size = self.world, min(self.world.topk, position + 1)
        table = world.batch.block_tables[row]
        positions = {ref_slot(p, table, BLOCK): p for p in range(position + 1)}
        chosen = [positions[slot] for slot in found[:size]]
        assert chosen == sorted(set(chosen)), (row, position)
        assert found[size:] == [-1] * (len(found) - size)
        scores = self.scores(t, list(positions))
        left = np.delete(scores, chosen)
        if len(left):
            rounding = 1e-5 * np.abs(scores).max()
            assert scores[chosen].min() >= left.max() - rounding, (row, position)

    def scores(self, t: int, slots: list[int]) -> np.ndarray:
        """float64 [keys]: sum over heads of weight * relu(q . key), of a token against slots."""
        codes, weights, _ = self.cpu_queries
        planes = self.world.wanted[1].reshape(len(self.world.wanted[1]), -1)
        keys = planes[:, : BLOCK * DIM].reshape(-1, DIM)[slots]
        scales = np.ascontiguousarray(planes[:, BLOCK * DIM :]).view(np.float32).reshape(-1)
        dots = E4M3_VALUES[codes[t]].astype(float) @ E4M3_VALUES[keys].astype(float).T
        return (weights[t].astype(float) @ np.maximum(dots, 0.0)) * scales[slots]

    def check_output(self, t: int, slots: list[int], found: np.ndarray) -> None:
        """Attention over the selected records, of the bfloat16 query and latents."""
        q = widened(self.cpu_queries[2][t]).astype(float)
        wanted = ref_attend(q, self.latents(slots), list(range(len(slots))), SCALE, RANK)
        bound = TOLERANCE[self.world.m.on_gpu] * np.abs(wanted).max()
        assert (np.abs(found - wanted) <= bound).all(), t

    def latents(self, slots: list[int]) -> np.ndarray:
        """float64 [keys, 576] of records, rounded to bfloat16 as attention multiplies them."""
        records = self.world.wanted[0].reshape(-1, 656)[slots]
        scales = np.repeat(np.ascontiguousarray(records[:, 512:528]).view(np.float32), 128, axis=1)
        rope = np.ascontiguousarray(records[:, 528:]).view(np.uint16)
        parts = [rounded(E4M3_VALUES[records[:, :512]] * scales), widened(rope)]
        return np.concatenate(parts, axis=1).astype(float)
