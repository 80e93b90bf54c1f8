"""V4AttentionBackend: the index arrays of a step once, then the attention of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fd_dsa.attention.protocol import AttentionBackend, BackendStep, HostLengths, PromptLimits
from fd_dsa.errors import MissingStepError
from fd_dsa.models.deepseek_v4.attention import V4Attention
from fd_dsa.models.deepseek_v4.config import CSA, DeepseekV4Config
from fd_dsa.models.deepseek_v4.rotation import Angles
from fd_dsa.ops.arrays import Scratch, as_numpy
from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.ops.logits.host_scores import score_gathered, score_paged
from fd_dsa.ops.mla import attend_dense, attend_gathered
from fd_dsa.ops.topk import select_positions
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.step import StepHints
from fd_dsa.tensor import StepArray
from fd_dsa.v4_attention.pools import LayerPools, allocate_pools, prepare_sizes
from fd_dsa.v4_attention.step import Tile, V4Step
from fd_dsa.v4_prepare import V4Prepare


class V4AttentionBackend(AttentionBackend):
    """Attention over windows and compressed entries in pages, with states in rows of the batch.

    Layers select compressed entries instead of tokens, so the host reads no selections.

    Args:
        config: configuration of the model.
        batch: rows of a step. Each row is a slot of the states.
        num_blocks: blocks of the pools, of `batch.block_size` tokens.
        max_drafts: maximum number of drafts of a row.
    """

    def __init__(
        self, config: DeepseekV4Config, batch: InputBatch, num_blocks: int, max_drafts: int = 0
    ) -> None:
        self._kinds = config.layer_types
        self._layout = config.cache_layout("float32", batch.block_size, max_drafts)
        self._num_heads = config.num_attention_heads
        self._topk, self._width = config.index_topk, config.head_dim
        self._num_slots = batch.max_num_seqs
        sizes = prepare_sizes(config, batch, num_blocks, max_drafts)
        self._comp_base = sizes.comp_base
        self._prepare = V4Prepare(sizes, "numpy")
        self._slots = np.arange(batch.max_num_seqs, dtype=np.int32)
        self._scratch = Scratch()
        self._step: V4Step | None = None
        self._built_for: BackendStep | None = None

    def allocate_caches(self, has_indexer: Sequence[bool] = ()) -> list[LayerPools]:
        """Allocate the pools of every layer, zeroed."""
        return allocate_pools(self._layout, self._prepare.cfg.num_blocks, self._num_slots)

    def build_step(
        self,
        forward_meta: BackendStep,
        inputs: Sequence[StepArray],
        hints: StepHints | None = None,
        host_lengths: HostLengths | PromptLimits | None = None,
    ) -> None:
        """Make the index arrays of a step, and its `position_ids`.

        Raises:
            ValueError: inconsistent lengths or block tables. The message has row and value.
        """
        _, before, q, tables = map(as_numpy, inputs[:4])
        self._prepare.stage(before + q, q, self._slots[: len(q)], tables)
        out = self._prepare.expand()
        self._step = step = V4Step(out, before, q, tables, self._num_heads)
        self._built_for, forward_meta.position_ids = forward_meta, step.positions

    def current_step(self, forward_meta: BackendStep) -> V4Step:
        """Return the index arrays of `forward_meta`, which must be the step built last."""
        if self._built_for is not forward_meta or self._step is None:
            raise MissingStepError(
                "the backend holds no step or another step: "
                "V4AttentionBackend.build_step must be called first"
            )
        return self._step

    def forward(
        self,
        layer: V4Attention,
        hidden: np.ndarray,
        rotation: Angles,
        forward_meta: BackendStep,
        shared: None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Write the keys of a layer, select entries and attend to them, as AttentionBackend says.

        Returns:
            float32 [num_tokens, num_heads, head_dim], not rotated back, valid until the next call;
            and the selection of `select`, None if every token attends to all entries.
        """
        projected, latent, kv, sources = layer.project(hidden, rotation)
        self.write(kv, sources, layer, forward_meta)
        selection = None
        if layer.has_indexer and self.current_step(forward_meta).needs_selection:
            queries = layer.index_queries(latent, projected, rotation)
            selection = self.select(*queries, layer.layer_id, forward_meta)
        query = layer.queries(latent, rotation)
        return self.attend(query, selection, layer, forward_meta), selection

    def write(
        self,
        kv: np.ndarray,
        sources: np.ndarray | None,
        layer: V4Attention,
        forward_meta: BackendStep,
    ) -> None:
        """Store a layer's window keys, and make and store the entries that the step finishes.

        Args:
            kv: float32 [num_tokens, head_dim], normed and rotated.
            sources: float32 [num_tokens, halves, 2, width], changed in place; None in a
                window-only layer.
            layer: layer of the keys.
            forward_meta: step of the keys.
        """
        step = self.current_step(forward_meta)
        pools: LayerPools = forward_meta.caches[layer.layer_id]
        pools.keys[step.window_rows] = kv
        if sources is None:
            return
        kind, compressor = self._kinds[layer.layer_id], layer.compressor
        assert compressor is not None, "only a layer with a compressor has sources"
        compressor.add_gates(sources, step.positions)
        if kind == CSA:
            step.records.restore(pools)
        plan = step.pooling(kind)
        assert pools.states is not None
        if plan.num_entries:
            entries = compressor.entries(plan.pooled(sources, pools.states), plan.first)
            pools.keys[plan.rows] = entries[0]
            if kind == CSA:
                assert pools.index_entries is not None
                width = entries[1].shape[1]
                pools.index_entries.reshape(-1, width)[plan.rows - self._comp_base] = entries[1]
        plan.keep(sources, pools.states)
        if kind == CSA:
            step.records.record(sources, pools)

    def select(
        self, q: np.ndarray, weights: np.ndarray, layer_id: int, forward_meta: BackendStep
    ) -> np.ndarray:
        """Select the entries that each token attends to.

        Args:
            q: float32 [num_tokens, index_n_heads, index_head_dim], rotated.
            weights: float32 [num_tokens, index_n_heads]; all factors folded in.
            layer_id: number of the layer.
            forward_meta: step of the tokens.

        Returns:
            int32 [num_tokens, index_topk]; entries, ascending, -1 last.
        """
        step = self.current_step(forward_meta)
        cache = forward_meta.caches[layer_id].index_entries
        selection = np.full((step.num_tokens, self._topk), -1, np.int32)
        for tokens, row in step.prompt_rows():
            visible = step.visible[tokens]
            slots = step.entry_rows(CSA, [row], int(visible[-1]))[0]
            if len(slots):
                scores = score_gathered(q[tokens], weights[tokens], cache, slots, self._scratch)
                selection[tokens] = select_positions(scores, visible, self._topk)
        if step.units is not None:
            at, units = step.units
            scores = score_paged(q[at, None], weights[at, None], cache, units, self._scratch)
            selection[at] = select_positions(scores[:, 0], step.visible[at], self._topk)
        return selection

    def attend(
        self,
        q: np.ndarray,
        selection: np.ndarray | None,
        layer: V4Attention,
        forward_meta: BackendStep,
    ) -> np.ndarray:
        """Attend to the window and the selected entries of a layer.

        Args:
            q: float32 [num_tokens, num_heads, head_dim], rotated; times the factor of the scores.
            selection: result of `select`; None: every token attends to all entries that it sees.
            layer: layer with the sinks of its heads.
            forward_meta: step of the tokens.

        Returns:
            float32 [num_tokens, num_heads, head_dim], valid until the next call.
        """
        step = self.current_step(forward_meta)
        kind, keys = self._kinds[layer.layer_id], forward_meta.caches[layer.layer_id].keys
        options: dict[str, Any] = {
            "softmax_scale": 1.0,
            "kv_lora_rank": self._width,
            "scratch": self._scratch,
            "sinks": layer.sinks,
        }
        at = step.gathered
        slots: Any = None
        if len(at):
            slots = (
                step.key_lists(kind)
                if selection is None
                else self._selected_list(step, selection[at])
            )
            if len(at) == step.num_tokens:
                return attend_gathered(q, keys, slots, **options)
        out = self._scratch.take("v4_attention", q.shape)
        if slots is not None:
            out[at] = attend_gathered(q[at], keys, slots, **options)
        for tile in step.tiles(kind):
            mask = tile.mask
            if selection is not None:
                mask = _mask_of_selected(tile, selection[tile.tokens])
            out[tile.tokens] = attend_dense(q[tile.tokens], keys, tile.keys, mask, **options)
        return out

    def _selected_list(self, step: V4Step, selection: np.ndarray) -> np.ndarray:
        """Return window and selected-entry rows of the gathering tokens, padded with -1."""
        entries = positions_to_slots(
            selection, step.rows[step.gathered], step.block_table, step.entries_per_block(CSA)
        )
        entries[entries >= 0] += self._comp_base
        return np.concatenate((step.window_list, entries), axis=1)


def _mask_of_selected(tile: Tile, selection: np.ndarray) -> np.ndarray:
    """Return the mask of a tile in which only selected entries are visible."""
    mask: np.ndarray = tile.mask.copy()
    entries = mask[:, tile.num_window :]
    entries[:] = -np.inf
    token, column = (selection >= 0).nonzero()
    entries[token, selection[token, column]] = 0.0
    return mask
