"""Writes, selection and attention of a step on a CPU, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.attention.protocol import HostLengths, IndexerLayer, MlaLayer, PromptLimits
from fd_dsa.attention.row_division import RowDivision
from fd_dsa.attention.step_plan import StepPlan
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.distributed import Group
from fd_dsa.ops.arrays import Scratch, as_numpy, check_shape
from fd_dsa.ops.cache_write import CacheWriteParams, store_keys, write_caches
from fd_dsa.ops.host_rows import rotate_
from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.ops.linear import Linear
from fd_dsa.ops.logits.host_scores import score_gathered, score_paged
from fd_dsa.ops.mla import KeyLists, attend_dense, attend_gathered
from fd_dsa.ops.providers import select_all
from fd_dsa.ops.query import prepare_on_host
from fd_dsa.ops.topk import select_positions
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Array, StepArray

if TYPE_CHECKING:
    from fd_dsa.attention.dense_prompts import DensePrompts
    from fd_dsa.attention.head_exchange import HeadExchange


class HostAttention:
    """Writer and reader of the caches on a CPU, with buffers that all layers and steps share.

    Activations are NumPy arrays or Paddle CPU tensors. `write` checks its arguments in full when a
    layer first passes their shapes and types, and not again.

    Args:
        group: ranks that divide the scores of long steps; None = one rank.

    Attributes:
        dense: None, because all queries are absorbed on a CPU. The step's plan lists the tokens
            that read all keys of their rows.
        exchange: None, because a CPU reads the keys of all heads as fast as those of some.
    """

    def __init__(self, config: DSABackendConfig, group: Group | None = None) -> None:
        self.config, self._division = config, RowDivision(group, config.index_topk)
        self.dense: DensePrompts | None = None
        self.exchange: HeadExchange | None = None
        layout = config.cache_layout
        self._query_format = config.query_format
        self._rotates_only = not layout.is_fp8 and not layout.index_hadamard
        self.block_size = layout.block_size
        self._slots = np.full(config.max_num_tokens * config.index_topk, -1, np.int32)
        self._scratch = Scratch()
        self._plan: StepPlan | None = None
        # id of a cache's tensor object -> the tensor, and an array over its memory
        self._views: dict[int, tuple[Any, np.ndarray]] = {}
        self._checked: set[tuple[Any, ...]] = set()
        select_all("cpu")

    def begin_step(
        self,
        step: ForwardMeta | None = None,
        lengths: HostLengths | PromptLimits | None = None,
    ) -> None:
        """Drop the plan of the previous step, and views of the caches if no step follows."""
        self._plan = None
        if step is None:
            self._views.clear()
            self._checked.clear()

    def allocate_cache(self, shape: list[int]) -> Array:
        """Allocate a zeroed cache."""
        return self.config.cache_layout.allocate(shape)

    def projection_buffers(self, num_tokens: int) -> None:
        """Return None, because operators on a CPU make their results or overwrite inputs."""

    def query_buffers(self, num_tokens: int) -> None:
        """Return None, see `projection_buffers`."""

    def mla_query_buffer(self, num_tokens: int) -> None:
        """Return None, see `projection_buffers`."""

    def project(
        self, layer: MlaLayer, indexer: IndexerLayer, hidden: Array, overlap: IndexerOverlap
    ) -> tuple[Array, Array, Array, Array]:
        """Project a layer's input, without a second stream on a CPU.

        Returns:
            Latents of queries and keys, index keys and head weights.
        """
        latent, kv_a, joined = layer.project_qkv_a(hidden)
        index_k, weights = indexer.project(hidden)
        return latent, kv_a, index_k if joined is None else joined, weights

    def prepare_indexer_query(
        self, q: np.ndarray, weights: np.ndarray, cos_sin: np.ndarray, rope_interleave: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Convert queries of an indexer to the format of its keys, by `indexer_query`."""
        if self._rotates_only:
            rotate_(q[:, :, : cos_sin.shape[1]], cos_sin, interleaved=rope_interleave)
            return q, weights
        how = {"rope_interleave": rope_interleave, **self._query_format}
        return prepare_on_host(q, weights, None, cos_sin, **how)

    def absorbed_query(
        self, keys: Linear, q: np.ndarray, rows: Array | None, cos_sin: np.ndarray
    ) -> np.ndarray:
        """Multiply the first values of each head by `keys`, and rotate the others."""
        latent, pairs = np.split(q, [q.shape[2] - cos_sin.shape[1]], axis=2)
        absorbed = as_numpy(keys.matmul_by_head(latent))
        query = np.concatenate((absorbed, pairs), axis=-1)
        rotate_(query[:, :, absorbed.shape[2] :], cos_sin, interleaved=True)
        return query

    def plan(self, step: ForwardMeta) -> StepPlan:
        """Return the work lists of the step, made for the first layer that needs them."""
        if self._plan is None:
            self._plan = StepPlan(step, self.config, self._slots)
            if self._division.is_active:
                self._divide(self._plan)
        return self._plan

    def _divide(self, plan: StepPlan) -> None:
        """Divide the score tiles of a step among the ranks."""
        tiles = plan.score_tiles
        starts = np.array([tile.tokens.start for tile in tiles] + [plan.num_tokens])
        costs = np.array([len(tile.window) * len(tile.key_slots) for tile in tiles])
        self._division.divide(starts, costs, sum(len(tile.window) for tile in tiles))

    def write(
        self,
        step: ForwardMeta,
        kv_a: StepArray,
        index_k: StepArray | None,
        cos_sin: StepArray,
        latent_cache: StepArray,
        index_cache: StepArray | None,
        params: CacheWriteParams,
    ) -> None:
        """Write the keys of a step, see DSAAttentionBackend.write."""
        slots = step.slot_mapping
        arrays = kv_a, cos_sin, index_k
        form: Any = None
        if type(kv_a) is type(cos_sin) is np.ndarray:
            shape = None if index_k is None else index_k.shape
            form = (id(latent_cache), id(index_cache), id(params), kv_a.dtype)
            form += (kv_a.shape, cos_sin.shape, shape, slots.shape[0])
        if form is None or form not in self._checked:
            caches = latent_cache, index_cache
            write_caches(kv_a, index_k, None, slots, cos_sin, *caches, params)
            if form is not None:
                # the views keep the caches alive, because their ids are part of the form
                for cache in caches:
                    if cache is not None:
                        self._view(cache)
                self._checked.add(form)
            return
        latents = self._views[id(latent_cache)][1]
        keys = None if index_k is None else self._views[id(index_cache)][1]
        where = self.plan(step).places_in(latents.shape[0])
        store_keys(*arrays[::2], cos_sin, latents[:, 0], keys, where, params)

    def _view(self, cache: Array) -> np.ndarray:
        """Return an array over the memory of a cache, made once for each cache."""
        held = self._views.get(id(cache))
        if held is None or held[0] is not cache:
            held = self._views[id(cache)] = cache, as_numpy(cache)
        return held[1]

    def select(self, step: ForwardMeta, q: Array, weights: Array, cache: Array) -> Array:
        """Select keys, see DSAAttentionBackend.select. The cache is the layer's indexer cache."""
        plan = self.plan(step)
        if plan.needs_scores:
            self._score(plan, as_numpy(q), as_numpy(weights), self._view(cache))
            self._division.gather(plan.slots)
        return plan.selection

    def attend(self, step: ForwardMeta, q: Array, cache: Array, selection: Array) -> Array:
        """Attend, see DSAAttentionBackend.attend. The cache is the layer's latent cache.

        The result is an array if `q` is one, else a tensor.
        """
        plan, latents = self.plan(step), self._view(cache)
        rows = latents.reshape(-1, latents.shape[-1])
        slots = plan.slots
        if selection is not plan.selection:
            slots = as_numpy(selection).reshape(-1, selection.shape[-1])
        if slots.shape[0] != q.shape[0]:
            check_shape("attend", "selection", slots, (q.shape[0], None))
        if isinstance(q, np.ndarray):
            return self._attend(plan, q, rows, slots)
        return as_tensor(self._attend(plan, as_numpy(q), rows, slots))

    def _score(self, plan: StepPlan, q: np.ndarray, weights: np.ndarray, cache: np.ndarray) -> None:
        """Fill `plan.slots` for this rank's tokens with more keys than `index_topk`."""
        begin, end = self._division.part(plan.num_tokens)
        for tile in plan.score_tiles:
            if not begin <= tile.tokens.start < end:
                continue
            logits = score_gathered(
                q[tile.tokens], weights[tile.tokens], cache, tile.key_slots, self._scratch
            )
            if tile.window_start is not None:
                # move the first key of each token's window to column 0
                column = tile.window_start[:, None] + np.arange(int(tile.window.max()))[None, :]
                logits = np.take_along_axis(logits, np.minimum(column, logits.shape[1] - 1), axis=1)
            self._keep_best(plan, tile.tokens, logits, tile.window)
        if plan.decode_rows is not None:
            tokens, window, units = plan.decode_rows
            logits = score_paged(q[tokens], weights[tokens], cache, units, self._scratch)
            self._keep_best(plan, tokens.ravel(), logits.reshape(-1, logits.shape[2]), window)

    def _keep_best(
        self, plan: StepPlan, tokens: slice | np.ndarray, logits: np.ndarray, window: np.ndarray
    ) -> None:
        """Select the best keys of some tokens by the scores of their windows."""
        positions = select_positions(logits, window, plan.topk)
        if plan.has_late_windows:
            positions = np.where(positions < 0, -1, positions + plan.first_key[tokens, None])
        plan.slots[tokens] = positions_to_slots(
            positions, plan.batch_ids[tokens], plan.block_tables, self.block_size
        )

    def _attend(
        self, plan: StepPlan, q: np.ndarray, rows: np.ndarray, slots: np.ndarray
    ) -> np.ndarray:
        """Attend for short prompts in tiles, for other tokens one by one.

        Args:
            rows: [num_slots, row]; the layer's latent cache.
            slots: int32 [num_tokens, topk]; selected slots of each token.

        Returns:
            float32 [num_tokens, num_heads, kv_lora_rank].
        """
        config, scratch = self.config, self._scratch
        scale, rank = config.softmax_scale, config.cache_layout.kv_lora_rank
        options: dict[str, Any] = {"softmax_scale": scale, "kv_lora_rank": rank, "scratch": scratch}
        tokens = plan.gathered_tokens
        has_all = len(tokens) == len(q)
        lists: np.ndarray | KeyLists = slots
        if slots is plan.slots and not plan.needs_scores:
            lists = plan.key_lists
        elif not has_all:
            lists = slots[tokens]
        if has_all:
            return attend_gathered(q, rows, lists, **options)
        out = scratch.take("attention", (q.shape[0], q.shape[1], rank))
        out[plan.num_tokens :] = 0.0
        for i, tile in enumerate(plan.dense_tiles):
            if plan.needs_scores:
                mask = tile.mask(slots[tile.tokens], plan.slot_position)
            else:
                mask = plan.masks[i]
            out[tile.tokens] = attend_dense(q[tile.tokens], rows, tile.key_slots, mask, **options)
        if len(tokens):
            out[tokens] = attend_gathered(q[tokens], rows, lists, **options)
        return out
