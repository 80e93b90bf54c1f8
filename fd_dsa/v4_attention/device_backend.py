"""V4DeviceBackend: index arrays of a step by one launch, then the attention of each layer.

Each row of the batch owns rings and states. A snapshot is written by a step with prompts, or copied
from a row. Decode steps store keys in the ring before attention, steps with prompts after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fd_dsa.attention.device_memory import logits_size
from fd_dsa.attention.device_scores import SelectedScores, kernel_kind
from fd_dsa.attention.protocol import AttentionBackend, BackendStep, HostLengths, PromptLimits
from fd_dsa.device.allocation import Allocate, Buffers, add_buffers, paddle_allocator
from fd_dsa.device.transfers import uploaded
from fd_dsa.distributed import Group
from fd_dsa.distributed.equal_parts import EqualParts
from fd_dsa.errors import MissingStepError
from fd_dsa.models.deepseek_v4.config import WINDOW, DeepseekV4Config
from fd_dsa.models.deepseek_v4.device_attention import DeviceCompressor, DeviceV4Attention
from fd_dsa.models.rope import cos_sin_table
from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.slot_copy import copy_slot
from fd_dsa.ops.topk.custom_op import slot_selector
from fd_dsa.ops.v4_attend import attend_v4, new_partials
from fd_dsa.ops.v4_entries import Compression, Plan, Pooling
from fd_dsa.ops.v4_places import Entries, PlainKeys, Windows
from fd_dsa.ops.v4_plain import PlainRows
from fd_dsa.ops.v4_rotation import rotate_heads
from fd_dsa.ops.v4_write_kernels import Ring, keep_step, write_step
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.step import StepHints
from fd_dsa.tensor import Fp8Rows, Normed, StepArray, Tensor
from fd_dsa.v4_attention.device_memory import indexer_sizes, plain_sizes
from fd_dsa.v4_attention.device_pools import DeviceLayout, DevicePools
from fd_dsa.v4_attention.device_step import DeviceStep, StepPlaces


class V4DeviceBackend(AttentionBackend):
    """Attention over rings of windows and compressed entries in blocks.

    Layers select compressed entries instead of tokens, so the host reads no selections.

    Args:
        config: configuration of the model.
        batch: rows of a step. Each row is a slot of the rings and states.
        num_blocks: blocks of the pools, of `batch.block_size` tokens.
        device: "gpu:0" or a custom device of Paddle.
        dtype: type of activations.
        num_snapshots: slots of rings and states in addition to those of the rows.
        max_drafts: maximum number of drafts of a row.
        kv_cache_dtype: format of keys and entries, see DeviceLayout; None = `dtype`.
        group: ranks that share the model and select for parts of a long step; None = one rank.

    Attributes:
        scores: kernels that score the entries of CSA layers.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        batch: InputBatch,
        num_blocks: int,
        device: str,
        dtype: str,
        allocate: Allocate | None = None,
        *,
        num_snapshots: int = 0,
        max_drafts: int = 0,
        kv_cache_dtype: str | None = None,
        group: Group | None = None,
    ) -> None:
        self._num_snapshots, self._group = num_snapshots, group
        self._max_tokens = batch.max_num_tokens
        EqualParts.announce(group)
        self._slots: list[tuple[Tensor, int]] = []
        self._config, self._num_rows, self._num_blocks = config, batch.max_num_seqs, num_blocks
        self._allocate = allocate = allocate or paddle_allocator(device)
        sizes = batch.block_size, max_drafts
        self._layout = DeviceLayout(config, kv_cache_dtype or dtype, *sizes)
        self._places = StepPlaces(self._layout, batch, allocate)
        width, longest = config.qk_rope_head_dim, batch.max_row_len
        # angles of layers with entries, then of window-only layers
        self._angles = [
            uploaded(allocate, cos_sin_table(rope, width, longest, has_scale=False))
            for rope in (config.compress_rope, config.main_rope)
        ]
        self._partials = new_partials(config.head_dim, allocate)
        of_index, buffers = indexer_sizes(self._layout, batch, dtype), Buffers()
        plain = plain_sizes(self._layout, batch, dtype)
        add_buffers(buffers, logits_size(of_index, plain.least_words if plain else 0), allocate)
        logits = buffers["logits"][0]
        # the buffer of scores is free when the tokens of a layer attend
        self._plain = PlainRows(plain, logits, allocate) if plain else None
        kind = kernel_kind(logits)
        self._select_slots = slot_selector(kind, allocate)
        self.scores = SelectedScores(of_index, kind, buffers, allocate)
        self._step: DeviceStep | None = None
        self._built_for: BackendStep | None = None
        self._parts = EqualParts(group, 0)

    def padded_tokens(self, num_tokens: int) -> int:
        """Return the tokens of a long eager step with padding, so that the ranks divide it."""
        padded = EqualParts.padded(self._group, num_tokens)
        return padded if padded <= self._max_tokens else num_tokens

    def allocate_caches(self, has_indexer: Sequence[bool] = ()) -> list[DevicePools]:
        """Allocate the pools of every layer."""
        counts = self._num_blocks, self._num_rows, self._num_snapshots
        pools, self._slots = self._layout.allocate(*counts, self._allocate)
        return pools

    @property
    def slots(self) -> list[Tensor]:
        """Slots of rows and of snapshots of every layer, [num_slots, values] each."""
        num_slots = self._num_rows + self._num_snapshots
        return [
            whole.reshape([num_layers, num_slots, -1])[layer]
            for whole, num_layers in self._slots
            for layer in range(num_layers)
        ]

    def copy_slot(self, source: int, target: int) -> None:
        """Enqueue the copy of a row or snapshot to another one, two launches for all layers.

        The snapshots follow the rows. They are at the ends of blocks, where HCA layers need no
        states.
        """
        num_slots = self._num_rows + self._num_snapshots
        for slots, num_layers in self._slots:
            copy_slot(slots, num_slots, num_layers, source, target)

    def build_step(
        self,
        forward_meta: BackendStep,
        inputs: Sequence[StepArray],
        hints: StepHints | None = None,
        host_lengths: HostLengths | PromptLimits | None = None,
    ) -> None:
        """Enqueue the launches that prepare a step, and set its `position_ids`.

        One launch makes the index arrays, and another one the schedule of scores if tokens have to
        select. The work may be captured. No lengths of rows are needed, because every count of the
        step is a bound.

        Args:
            forward_meta: step of the runner.
            inputs: tensors on the device. The second has the tokens of each row before the step,
                the third those in it, and the fourth the block tables. The fifth, if any, has the
                places of snapshots.
            hints: counts of the step, required.
            host_lengths: ignored.

        Raises:
            MissingStepError: `hints` has no number of tokens, or no longest row.
        """
        num_tokens, prefill, longest, padded = hints or StepHints()
        if num_tokens is None or longest is None:
            raise MissingStepError(
                "V4DeviceBackend.build_step: num_tokens and max_seqlen_k of the step are needed"
            )
        _, before, new, tables, *slots = inputs
        num_tokens = num_tokens if padded is None else padded
        # an answer that ends a block is copied
        writes_snapshots = prefill != 0 and slots and self._num_snapshots
        self._step = step = self._places.fill(
            *(before, new, tables, num_tokens, longest),
            slots[0] if writes_snapshots else None,
            has_prompts=prefill != 0,
        )
        plain_tokens = num_tokens if prefill != 0 else 0
        if self._plain is not None and self._plain.serves(before, plain_tokens):
            places = self._plain.place(before, new, tables, self._num_blocks)
            self._step = step = replace(step, plain=places)
        self._built_for, self._parts = forward_meta, EqualParts(self._group, num_tokens)
        if step.index_view is not None:
            # all layers share the schedule of the scores
            self.scores.prepare(step.index_view, self._parts.own)
        forward_meta.position_ids = step.places.positions[:num_tokens]
        # the rows stand for slots, because both are below 0 for padding
        forward_meta.slot_mapping = step.places.rows[:num_tokens]

    def current_step(self, forward_meta: BackendStep) -> DeviceStep:
        """Return the index arrays of `forward_meta`, which must be the step built last."""
        if self._built_for is not forward_meta or self._step is None:
            raise MissingStepError(
                "the backend holds no step or another step: "
                "V4DeviceBackend.build_step must be called first"
            )
        return self._step

    def forward(
        self,
        layer: DeviceV4Attention,
        hidden: Tensor | Normed,
        rotation: None,
        forward_meta: BackendStep,
        shared: None = None,
    ) -> tuple[Tensor | Fp8Rows, Tensor | None]:
        """Write the keys of a layer, select entries and attend to them, see AttentionBackend.

        Args:
            rotation: None, because the backend has the angles of all positions.

        Returns:
            [num_tokens, num_heads * head_dim], rotated back, as `layer.round_scales` says; and the
            result of `select_entries`, None if every token attends to all entries.
        """
        step, pools = self.current_step(forward_meta), forward_meta.caches[layer.layer_id]
        config, positions = self._config, step.places.positions
        kind = config.layer_types[layer.layer_id]
        cos_sin = self._angles[kind == WINDOW]
        projected, sources, head_weights = layer.project(hidden)
        compression = _compression(layer, sources, pools, step.plans.get(kind))
        norm, ring = layer.q_norm, Ring(step.ring_rows, pools.ring)
        latent, keys = write_step(
            projected,
            *(norm.weight, layer.kv_norm, norm.epsilon),
            cos_sin,
            positions,
            compression,
            None if step.has_prompts else ring,
            round_scales=norm.round_scales,
            as_records=self._layout.is_fp8,
        )
        entries, slots = None, None
        if head_weights is not None and step.index_view is not None:
            query, index_query = layer.queries_and_index(latent)
            slots = self.select_entries(index_query, head_weights, pools.index_entries, step)
        else:
            query = layer.queries(latent)
        if compression is not None:
            entries = Entries(pools.entries, compression.plan.ratio, slots)
        windows = Windows(keys, pools.ring, self._layout.ring_rows, config.sliding_window)
        inputs = layer.sinks, cos_sin, step.places, norm.epsilon, self._partials
        plain = self._plain_keys(step, windows, entries)
        out = attend_v4(query, windows, entries, *inputs, layer.round_scales, plain)
        if step.has_prompts:
            # a later token of a prompt may take the place of a key that attention has read
            keep_step(keys, ring, compression, step.snapshot_rows)
        return out, slots

    def select_entries(self, q: Tensor, weights: Tensor, cache: Tensor, step: DeviceStep) -> Tensor:
        """Return the slots of the entries that each token attends to, int32 [num_tokens, topk].

        A slot of a plain row is a row of `PlainKeys.pool`.

        Args:
            q: queries of the indexer, [num_tokens, index_n_heads * index_head_dim], not rotated.
            weights: float32 [num_tokens, index_n_heads].
            cache: entries of the indexer, [num_blocks, entries of a block, width].
            step: step whose tokens have to select, built last.
        """
        view, places = step.index_view, step.places
        assert view is not None
        table, num_blocks = view.block_tables, cache.shape[0]
        if step.plain is not None:
            # of two pools, whose readers compare slots with the number of their own
            table, num_blocks = step.plain.block_table, max(num_blocks, step.plain.capacity)
        cos_sin, is_fp8 = self._angles[False], self._layout.is_fp8
        q, weights = rotate_heads(q, weights, cos_sin, places.positions, as_codes=is_fp8)
        parts = self._parts
        slots = empty_beside(weights, step.num_tokens, self._config.index_topk, dtype="int32")

        def use(scores: Tensor, first_token: int) -> None:
            self._select_slots(
                scores,
                *(view.position_ids, view.batch_id_per_token, table, slots),
                block_size=cache.shape[1],
                num_blocks=num_blocks,
                first_token=first_token,
            )

        self.scores.compute(view, parts.own, q, weights, cache, use)
        return parts.gathered(parts.take(slots))

    def _plain_keys(
        self, step: DeviceStep, windows: Windows, entries: Entries | None
    ) -> PlainKeys | None:
        """Return the values of a layer's records that plain rows read, None without such rows."""
        if self._plain is None or step.plain is None:
            return None
        places = step.places
        return self._plain.fill(windows, entries, places.rows, places.block_table.shape[0])


def _compression(
    layer: DeviceV4Attention, sources: Tensor | None, pools: DevicePools, plan: Plan | None
) -> Compression | None:
    """Return the compressors of a layer in a step, None in a window-only layer."""
    main = _pooling(layer.compressor, pools.entries)
    if main is None or sources is None or pools.states is None or plan is None:
        return None
    of_index = _pooling(layer.index_compressor, pools.index_entries)
    return Compression(sources, pools.states, plan, main, of_index)


def _pooling(compressor: DeviceCompressor | None, entries: Tensor | None) -> Pooling | None:
    if compressor is None or entries is None:
        return None
    return Pooling(compressor.gates, compressor.norm, entries)
