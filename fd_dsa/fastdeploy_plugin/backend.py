"""FastDeploy's DSAAttentionBackend: its constructor, methods and caches, over our kernels.

An object holds our own `fd_dsa.attention.DSAAttentionBackend`, made in the first step, since only
the runner's block tables say on which device they are and how wide they are. That step is the
profile run, or the first one of a capture's warm-up: all buffers are there before anything is
captured.

Source: FastDeploy's `layers/attention/dsa_attention_backend.py` and `base_attention_backend.py`
(#7367, #7598, #7787, #8041, #8060).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import paddle

from fd_dsa.attention import DSAAttentionBackend as CoreBackend
from fd_dsa.attention import StepHints
from fd_dsa.attention.backend import cache_of
from fd_dsa.errors import ConfigError, MissingStepError
from fd_dsa.fastdeploy_plugin import steps
from fd_dsa.fastdeploy_plugin.projections import IndexerProjections, float32, key_norms
from fd_dsa.fastdeploy_plugin.settings import core_config, upstream_attributes
from fd_dsa.fastdeploy_plugin.tree_checks import ATTENTION, cache_shapes
from fd_dsa.ops._host import readable
from fd_dsa.ops._linear import joined
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.providers import device_name

# fields in which two rotary embeddings of one shape may differ
_OF_TABLE = ("rotary_dim", "max_position_embeddings", "base", "scaling_factor", "mscale")

logger = logging.getLogger(__name__)


class PluginBackend:
    """The DSA backend as FastDeploy constructs and calls it; one object serves all layers.

    `take_over` derives the class that is bound from this one and FastDeploy's.

    Args:
        fd_config: FastDeploy's configuration.
        kv_num_heads: kept as an attribute: all heads share one latent.
        num_heads: attention heads on this rank.
        head_dim, encoder_block_shape_q, decoder_block_shape_q: not used, as upstream.

    Attributes:
        upstream_file: the module of FastDeploy's own backend, None where it was not imported.
        tree_summary: the FastDeploy that the class was made for, for logs.
        config: of our own backend.
        core: our own backend, None before the first step.
        shared_selection: what the newest indexer chose, for layers without one of their own.

    Raises:
        ConfigError: sizes for which there are no DSA caches, or MTP's draft model.
        BackendUnavailable: disaggregation without the operators that it takes.
    """

    # FastDeploy's static graphs read the types of a backend's class attributes: annotate none here
    __infer_dynamic_dims_fields__ = ("attention_metadata",)
    upstream_file = None
    tree_summary = ""

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        encoder_block_shape_q: int = -1,
        decoder_block_shape_q: int = -1,
    ) -> None:
        config = core_config(fd_config, num_heads, str(paddle.get_default_dtype()))
        if fd_config.speculative_config.model_type == "mtp":
            raise ConfigError(
                "speculative_config.method: got 'mtp', but FastDeploy has no draft model with DSA: "
                "its proposer (spec_decode/mtp.py) unpacks two cache shapes of three, and gives "
                "drafts neither positions nor slots; start it without --speculative-config"
            )
        # instead of FastDeploy's constructor, which cannot read every model's rope_scaling
        vars(self).update(upstream_attributes(fd_config, config))
        init_rank = import_module(f"{ATTENTION}.utils").init_rank_and_device_id
        self.rank, self.device_id = init_rank(fd_config)
        self.kv_num_heads = kv_num_heads
        steps.check_operators(self.pd_disaggregation_mode)
        self.attention_metadata = None
        self.config, self.core = config, None
        self.shared_selection: Any = None
        self._counts, self._next_count = [0, 0, 0], 1
        self._has_prefill: bool | None = None
        self._built_for: Any = None
        self._transfers: Any = None
        self._copies: list[tuple[Callable[[], Any], Any]] = []
        self._norms: dict[tuple[int, bool], CacheWriteParams] = {}
        self._projections: dict[int, IndexerProjections] = {}
        self._tables: dict[tuple[Any, ...], Any] = {}
        self._weights_may_change = bool(getattr(fd_config.load_config, "dynamic_load_weight", 0))

    def serve_runner(self, position_dtype: str) -> None:
        """Serve a runner with our hooks, which calls `refresh_weights` after other weights came.

        Positions are int32, or of the dtype of the runner's own.
        """
        self.config = replace(self.config, int32_position_ids=position_dtype == "int32")
        self._weights_may_change = False

    def set_step_hints(self, has_prefill: bool | None) -> None:
        """Whether the step whose metadata is made next has a prefill row; None = not known."""
        self._has_prefill = has_prefill

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Make the step's metadata, once per object; everything that layers share is in it.

        Sets `fd_dsa_step` and, in the tree's dtypes, `position_ids`, `slot_mapping` and, where a
        prefill row may be there, `indexer_attn_mask_offsets`. `max_len_tensor_cpu` gets upper
        bounds; FastDeploy's operator, which waits for the device, is not called.

        Raises:
            MissingStepError: the runner has not filled the lengths or the block tables.
            CapacityError: more tokens than FastDeploy's configuration allows a step.

        Cost: one launch; no wait, no copy; no allocation once the views of a size exist. Where
        weights may change without notice (RL, FastDeploy's own runner), also copies of the norms.
        """
        # trees from #8041 on make a backend for each layer; all layers go through the first one
        first = getattr(forward_meta, "attn_backend", None)
        if self._built_for is forward_meta or first not in (None, self):
            return
        if self._weights_may_change:
            self.refresh_weights()
        rows = steps.step_rows(forward_meta)
        core = self._core_for(rows[3])
        num_tokens = int(forward_meta.ids_remove_padding.shape[0])
        has_prefill = self._has_prefill is not False and num_tokens > 0
        self._has_prefill = self.shared_selection = None
        core.build_step(forward_meta, rows, self._hints(num_tokens, has_prefill))
        self._bound_lengths(forward_meta, num_tokens, has_prefill)
        self.attention_metadata = self._metadata(forward_meta)
        steps.begin_step(self, self.attention_metadata, forward_meta)
        self._built_for = forward_meta
        if not getattr(forward_meta, "is_dummy_or_profile_run", False):
            self._count(num_tokens, has_prefill)

    def norms_of(self, layer_id: int, kv_norm: Any, indexer: Any) -> CacheWriteParams:
        """`key_norms` of a layer, made at its first step, when the weights are loaded."""
        key = layer_id, kv_norm is None
        if key not in self._norms:
            layout = self.config.cache_layout
            self._norms[key] = key_norms(layout, kv_norm, indexer, self._keep)
        return self._norms[key]

    def projections_of(self, indexer: Any, hidden_states: Any) -> IndexerProjections:
        """Projections of a layer's indexer, made at its first step, when the weights are loaded."""
        kept, layer_id = self._projections, indexer.layer_id
        if layer_id not in kept:
            linears = indexer.wk, indexer.weights_proj
            keep = None if self._weights_may_change else self._keep
            kept[layer_id] = IndexerProjections(*linears, hidden_states, keep)
        return kept[layer_id]

    def cos_sin_of(self, rotary_emb: Any) -> Any:
        """Table of a layer's rotary embedding, float32 [max_position, rope_dim].

        One for all layers that agree; of NumPy on a CPU.
        """
        cached = rotary_emb.cos_sin_cache
        key = (*cached.shape, *(getattr(rotary_emb, name, None) for name in _OF_TABLE))
        if key not in self._tables:
            self._tables[key] = readable(float32(cached))
        return self._tables[key]

    def _keep(self, convert: Callable[[], Any]) -> Any:
        """What a function makes of a weight; `refresh_weights` makes it again at this address."""
        self._copies.append((convert, convert()))
        return self._copies[-1][1]

    def refresh_weights(self) -> None:
        """Read again what is kept of weights, at the same addresses, so that graphs see it."""
        with paddle.no_grad():
            for convert, copy in self._copies:
                paddle.assign(convert(), output=copy)

    def forget_step(self) -> None:
        """Let go of the newest step: the caches that it refers to are about to go."""
        self._built_for = self.shared_selection = None
        if self.core is not None:
            self.core.forget_step()

    def get_attention_meta(self) -> Any:
        """FastDeploy's own record of the newest step, None before the first."""
        return self.attention_metadata

    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Shapes of the key (latent), value (empty) and indexer cache of a layer, all bytes."""
        return cache_shapes(self.config.cache_layout, max_num_blocks)

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> dict[tuple[str, int], Any]:
        """Caches of some layers, zeroed bytes, for FastDeploy's V1 cache manager (#7787).

        Args:
            num_layers, layer_offset: which layers.
            num_blocks: of each cache.
            cache_dtype, kv_cache_quant_type: not used, as upstream.

        Returns:
            (role, layer) -> tensor, roles "key" and "indexer" in this order.
        """
        key_shape, _, indexer_shape = self.get_kv_cache_shape(num_blocks, kv_cache_quant_type)
        return {
            (role, layer): paddle.zeros(shape, "uint8")
            for layer in range(layer_offset, layer_offset + num_layers)
            for role, shape in (("key", key_shape), ("indexer", indexer_shape))
        }

    def create_host_kv_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: without a copy on the host no layer waits for blocks to be swapped in.

        FastDeploy's cache manager goes on without one, as with its own backend, and
        `forward_meta.layer_done_counter`, whose wait blocks the host, is never needed.
        """
        raise NotImplementedError("DSA caches have no copy on the host")

    def write_layer(
        self,
        kv_a: Any,
        index_k: Any,
        cos_sin_cache: Any,
        params: CacheWriteParams,
        layer_id: int,
        forward_meta: Any,
    ) -> None:
        """Write this step's keys of a layer, latents and indexer keys in one launch.

        Arguments are those of `write_caches`; either of `kv_a` and `index_k` may be None.
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

    def forward_mixed(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Attend to the selected slots of a layer; every token goes through it once.

        Args:
            q: [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed query.
            k, qkv: not used: keys are read from the cache.
            v: int32 [num_tokens, 1, topk]; physical slots, -1 = none, for every kind of row.
            compressed_kv: [num_tokens, kv_lora_rank], after its norm, which is written first; None
                from our own layers, which have written it.
            k_pe: [num_tokens, 1, qk_rope_head_dim], rotated; None with `compressed_kv`.
            layer: FastDeploy's Attention; `layer_id` alone is read.

        Returns:
            [num_tokens, num_heads, kv_lora_rank]; the buffer holds until the next layer.
        """
        if compressed_kv is not None:
            kv_a = joined(compressed_kv, k_pe.reshape([-1, k_pe.shape[-1]]))
            finished = CacheWriteParams(self.config.cache_layout.kv_cache_dtype)
            self.write_layer(kv_a, None, None, finished, layer.layer_id, forward_meta)
        return self.current_core().attend(q, v, layer.layer_id, forward_meta)

    # a decode-only step is one without prefill rows, and a prefill-only one the other way round
    forward_decode = forward_extend = forward_mixed

    def current_core(self) -> CoreBackend:
        """Our backend; MissingStepError where no step has been yet."""
        if self.core is None:
            raise MissingStepError(
                "there has been no step: init_attention_metadata(forward_meta) must be called first"
            )
        return self.core

    def _core_for(self, block_tables: Any) -> CoreBackend:
        """Our backend, made where these tables are."""
        if self.core is None:
            device = device_name(block_tables)
            self.config = replace(self.config, max_blocks_per_seq=int(block_tables.shape[1]))
            if device == "cpu":
                self.config = replace(self.config, dtype="float32")
            else:
                # kernels and their launcher are loaded only where a device is asked for
                from fd_dsa.triton_runtime.transfers import transfers_for

                self._transfers = transfers_for(block_tables)
            self.core = CoreBackend(self.config, device)
        return self.core

    def _max_keys(self) -> int:
        """Most keys of a row; drafts may reach past `max_model_len`."""
        longest = self.max_seq_len + self.config.tokens_per_row - 1
        return min(longest, self.config.max_blocks_per_seq * self.block_size)

    def _hints(self, num_tokens: int, has_prefill: bool) -> StepHints:
        """What the host knows: bounds, which hold for the replays of a graph too."""
        if self._transfers is None:
            # a CPU reads the counts of tokens from the lengths themselves
            return StepHints(max_seqlen_k=self._max_keys(), num_padded_tokens=num_tokens)
        return StepHints(num_tokens, num_tokens * has_prefill, self._max_keys(), num_tokens)

    def _bound_lengths(self, forward_meta: Any, num_tokens: int, has_prefill: bool) -> None:
        """Fill `max_len_tensor_cpu`, which the model reads, except during a capture."""
        target = getattr(forward_meta, "max_len_tensor_cpu", None)
        if target is not None and not (self._transfers and self._transfers.is_capturing()):
            tokens_per_row = self.config.tokens_per_row
            steps.fill_max_lens(target, num_tokens, has_prefill, tokens_per_row, self._max_keys())

    def _metadata(self, forward_meta: Any) -> Any:
        """FastDeploy's record of a step; what only its own kernels read stays unset."""
        metadata = getattr(self.upstream_file, "DSAAttentionMetadata", SimpleNamespace)()
        metadata.block_tables = forward_meta.block_tables
        metadata.rotary_embs = getattr(forward_meta, "rotary_embs", None)
        metadata.slot_mapping = forward_meta.slot_mapping
        return metadata

    def _count(self, num_tokens: int, has_prefill: bool) -> None:
        """Count a step of requests; log the first, the tenth, the hundredth and so on.

        A worker has no other way to show its counters: FastDeploy ends it without a word.
        """
        step = 1, int(has_prefill), num_tokens
        self._counts = [count + more for count, more in zip(self._counts, step, strict=True)]
        if self._counts[0] == self._next_count:
            self._next_count *= 10
            words = "fd_dsa: steps prepared: %d, with prompts: %d, tokens: %d"
            logger.info(words, *self._counts)
