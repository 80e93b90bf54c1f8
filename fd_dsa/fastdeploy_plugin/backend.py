"""FastDeploy's DSAAttentionBackend with fd_dsa's kernels.

An object holds a core backend, `fd_dsa.attention.DSAAttentionBackend`. The first step makes it,
because its device and width are those of the runner's block tables. That step belongs to the
profile run or to a capture's warm-up, so all buffers exist before a capture begins.

Constructor, cache shapes and `create_kv_cache` are FastDeploy's own.

Source: FastDeploy's `layers/attention/dsa_attention_backend.py` and `base_attention_backend.py`
(#7367, #7598, #7787, #8041, #8060).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import paddle

from fd_dsa.attention import DSAAttentionBackend as CoreBackend
from fd_dsa.attention import StepHints
from fd_dsa.attention.backend import cache_of
from fd_dsa.errors import ConfigError, MissingStepError
from fd_dsa.fastdeploy_plugin import steps
from fd_dsa.fastdeploy_plugin.projections import IndexerProjections, float32, key_norms
from fd_dsa.fastdeploy_plugin.settings import constructor_fields, core_config, replaced
from fd_dsa.fastdeploy_plugin.tree_checks import ARCHITECTURES
from fd_dsa.fastdeploy_plugin.upstream import (
    AdoptedIndexer,
    AttentionRecord,
    FDConfig,
    ForwardMeta,
    Indexer,
    RMSNorm,
    RotaryEmbedding,
)
from fd_dsa.ops.arrays import readable
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.providers import device_name
from fd_dsa.tensor import Tensor

if TYPE_CHECKING:
    from fd_dsa.fastdeploy_plugin.upstream import AttentionBackend
else:
    # `take_over` derives from FastDeploy's own class
    AttentionBackend = object

# fields in which two rotary embeddings of one shape may differ
_OF_TABLE = ("rotary_dim", "max_position_embeddings", "base", "scaling_factor", "mscale")

logger = logging.getLogger(__name__)


class PluginBackend(AttentionBackend):
    """DSA backend of a runner, one object for all layers.

    `take_over` derives the bound class from this one and FastDeploy's DSAAttentionBackend.

    Attributes:
        metadata_class: FastDeploy's class of a step's metadata.
        tree_summary: FastDeploy's version and the replaced class, for logs.
        config: configuration of the core backend.
        core: core backend, None before the first step.
        shared_selection: newest selection of an indexer, for layers without an indexer.
        projections: projections of the indexers that have run, by layer.
        transfers: copies and streams of the device, None on a CPU.

    Raises:
        ConfigError: sizes for which there are no DSA caches, or a draft model of MTP.
        BackendUnavailable: a mode of disaggregation without its operators.
    """

    # no annotations, because FastDeploy's static graphs resolve those of a backend's class
    __infer_dynamic_dims_fields__ = ("attention_metadata",)
    metadata_class = SimpleNamespace
    tree_summary = ""

    def __init__(self, fd_config: FDConfig, *args: object, **kwargs: object) -> None:
        if fd_config.speculative_config.model_type == "mtp":
            raise ConfigError(
                "speculative_config.method: got 'mtp', but FastDeploy has no draft model with DSA: "
                "its proposer (spec_decode/mtp.py) unpacks two cache shapes of three, and gives "
                "drafts neither positions nor slots; start it without --speculative-config"
            )
        with replaced(fd_config.model_config, **constructor_fields(fd_config.model_config)):
            super().__init__(fd_config, *args, **kwargs)
        steps.check_operators(self.pd_disaggregation_mode)
        self.attention_metadata: Any = None
        num_heads, scale = self.num_heads, self.attn_softmax_scale
        self.config = core_config(fd_config, num_heads, scale, str(paddle.get_default_dtype()))
        self.core: Any = None
        self.shared_selection: Any = None
        self._has_runner = False
        self._counts, self._next_count = [0, 0, 0], 1
        self._has_prefill: bool | None = None
        self._built_for: Any = None
        self.transfers: Any = None
        self._copies: list[tuple[Callable[[], Any], Any]] = []
        self._norms: dict[tuple[int, bool], CacheWriteParams] = {}
        self.projections: dict[int, IndexerProjections] = {}
        self._tables: dict[tuple[Any, ...], Any] = {}

    def serve_runner(self, position_dtype: str) -> None:
        """Accept steps of a runner with our hooks, whose positions have the given dtype."""
        self.config = replace(self.config, int32_position_ids=position_dtype == "int32")
        self._has_runner = True

    def set_step_hints(self, has_prefill: bool | None) -> None:
        """Set if the step whose metadata is built next may have a prefill row.

        Args:
            has_prefill: None = unknown.
        """
        self._has_prefill = has_prefill

    def init_attention_metadata(self, forward_meta: ForwardMeta, *_: object, **__: object) -> None:
        """Build the metadata of a step, once for each `forward_meta` object.

        Sets `fd_dsa_step` and, in the tree's dtypes, `position_ids` and `slot_mapping`. Also sets
        `indexer_attn_mask_offsets` if the step may have a prefill row. `max_len_tensor_cpu` gets
        upper bounds, so that FastDeploy's operator, which waits for the device, is not needed.
        Further arguments of a newer tree are ignored, because `forward_meta` holds the step.

        Raises:
            ConfigError: the runner has no hooks of fd_dsa.
            MissingStepError: the runner has not filled the lengths or the block tables.
            CapacityError: more tokens than FastDeploy's configuration allows a step.

        Cost: one launch, without a wait or a copy. Only the first step of a size allocates views.
        """
        if self._built_for is forward_meta:
            return
        if not self._has_runner:
            raise ConfigError(
                "model runner: FastDeploy runs one without fd_dsa's hooks, which the DSA backend "
                "needs; name only fd_dsa in FD_PLUGINS, or set FD_DSA_DISABLE=1"
            )
        rows = steps.step_rows(forward_meta)
        core = self._core_for(rows[3])
        num_tokens = int(forward_meta.ids_remove_padding.shape[0])
        has_prefill = self._has_prefill is not False and num_tokens > 0
        self._has_prefill = self.shared_selection = None
        core.build_step(forward_meta, rows, self._hints(num_tokens, has_prefill))
        self.bound_lengths(forward_meta, num_tokens, has_prefill)
        self.attention_metadata = self._metadata(forward_meta)
        steps.begin_step(self, self.attention_metadata, forward_meta)
        self._built_for = forward_meta
        if not getattr(forward_meta, "is_dummy_or_profile_run", False):
            self._count(num_tokens, has_prefill)

    def norms_of(
        self, layer_id: int, kv_norm: RMSNorm | None, indexer: AdoptedIndexer | None
    ) -> CacheWriteParams:
        """Return `key_norms` of a layer, made at its first step, after the load of weights."""
        key = layer_id, kv_norm is None
        if key not in self._norms:
            layout = self.config.cache_layout
            self._norms[key] = key_norms(layout, kv_norm, indexer, self._keep)
        return self._norms[key]

    def projections_of(self, indexer: Indexer, hidden_states: Tensor) -> IndexerProjections:
        """Return a layer's projections, made at its first step, after the load of weights."""
        kept, layer_id = self.projections, indexer.layer_id
        if layer_id not in kept:
            linears = indexer.wk, indexer.weights_proj
            kept[layer_id] = IndexerProjections(*linears, hidden_states, self._keep)
        return kept[layer_id]

    def cos_sin_of(self, rotary_emb: RotaryEmbedding) -> Any:
        """Return the table of a layer's rotary embedding, float32 [max_position, rope_dim].

        Layers with equal embeddings share it. On a CPU it is a NumPy array.
        """
        cached = rotary_emb.cos_sin_cache
        key = (*cached.shape, *(getattr(rotary_emb, name, None) for name in _OF_TABLE))
        if key not in self._tables:
            self._tables[key] = readable(float32(cached))
        return self._tables[key]

    def _keep(self, convert: Callable[[], Tensor]) -> Any:
        """Convert a weight, and again at the same address by `refresh_weights`."""
        self._copies.append((convert, convert()))
        return self._copies[-1][1]

    def refresh_weights(self) -> None:
        """Convert the weights again at the same addresses, which captured graphs read."""
        with paddle.no_grad():
            for convert, copy in self._copies:
                paddle.assign(convert(), output=copy)

    def drop_step_state(self) -> None:
        """Release the newest step before the caches that it refers to are freed."""
        self._built_for = self.shared_selection = None
        if self.core is not None:
            self.core.drop_step_state()

    def write_layer(
        self,
        kv_a: Tensor | None,
        index_k: Tensor | None,
        cos_sin_cache: Tensor,
        params: CacheWriteParams,
        layer_id: int,
        forward_meta: ForwardMeta,
    ) -> None:
        """Write this step's keys of a layer, latents and indexer keys in one launch.

        The arguments are those of `write_caches`. One of `kv_a` and `index_k` may be None.
        """
        step = self.current_core().current_step(forward_meta)
        if kv_a is not None:
            steps.begin_layer(self, self.attention_metadata, layer_id)
        write_caches(
            kv_a,
            index_k,
            step.position_ids,
            step.slot_mapping,
            cos_sin_cache,
            None if kv_a is None else cache_of(forward_meta, 2 * layer_id),
            None if index_k is None else cache_of(forward_meta, 2 * layer_id + 1),
            params,
        )

    def forward(self, *_: object, **__: object) -> Any:
        """Refuse FastDeploy's own layer, whose indexer selects other slots.

        Raises:
            ConfigError: always. Derived layers call `write_layer` and the core backend.
        """
        raise ConfigError(
            "attention layer: FastDeploy's own calls fd_dsa's DSA backend; fd_dsa serves the "
            f"architectures {', '.join(ARCHITECTURES)}; set FD_DSA_DISABLE=1 for others"
        )

    forward_mixed = forward_decode = forward_extend = forward

    def current_core(self) -> CoreBackend:
        """Return the core backend.

        Raises:
            MissingStepError: there has been no step.
        """
        if self.core is None:
            raise MissingStepError(
                "there has been no step: init_attention_metadata(forward_meta) must be called first"
            )
        return self.core

    def _core_for(self, block_tables: Tensor) -> CoreBackend:
        """Return the core backend, made by the first call on the device of the tables."""
        if self.core is None:
            device = device_name(block_tables)
            self.config = replace(self.config, max_blocks_per_seq=int(block_tables.shape[1]))
            if device == "cpu":
                self.config = replace(self.config, dtype="float32")
            else:
                # kernels and their launcher are loaded only if a device is asked for
                from fd_dsa.device.transfers import transfers_for

                self.transfers = transfers_for(block_tables)
            self.core = CoreBackend(self.config, device)
        return self.core

    def _max_keys(self) -> int:
        """Return the max keys of a row, whose drafts may reach past `max_model_len`."""
        longest = self.max_seq_len + self.config.tokens_per_row - 1
        return min(longest, self.config.max_blocks_per_seq * self.block_size)

    def _hints(self, num_tokens: int, has_prefill: bool) -> StepHints:
        """Return upper bounds of a step, which also hold for the replays of a graph."""
        if self.transfers is None:
            # on a CPU the builder counts the tokens itself
            return StepHints(max_seqlen_k=self._max_keys(), num_padded_tokens=num_tokens)
        return StepHints(num_tokens, num_tokens * has_prefill, self._max_keys(), num_tokens)

    def bound_lengths(self, forward_meta: ForwardMeta, num_tokens: int, has_prefill: bool) -> None:
        """Fill `max_len_tensor_cpu`, which the model reads, except during a capture."""
        target = getattr(forward_meta, "max_len_tensor_cpu", None)
        if target is not None and not (self.transfers and self.transfers.is_capturing()):
            tokens_per_row = self.config.tokens_per_row
            steps.fill_max_lens(target, num_tokens, has_prefill, tokens_per_row, self._max_keys())

    def _metadata(self, forward_meta: ForwardMeta) -> AttentionRecord:
        """Return FastDeploy's record of a step, without fields of its own kernels."""
        metadata = self.metadata_class()
        metadata.block_tables = forward_meta.block_tables
        metadata.rotary_embs = getattr(forward_meta, "rotary_embs", None)
        metadata.slot_mapping = forward_meta.slot_mapping
        return metadata

    def _count(self, num_tokens: int, has_prefill: bool) -> None:
        """Count a step of requests, and log the counters after 1, 10, 100, ... steps.

        A log line is the only way to show them, because FastDeploy kills its workers.
        """
        step = 1, int(has_prefill), num_tokens
        self._counts = [count + more for count, more in zip(self._counts, step, strict=True)]
        if self._counts[0] == self._next_count:
            self._next_count *= 10
            words = "fd_dsa: steps prepared: %d, with prompts: %d, tokens: %d"
            logger.info(words, *self._counts)
