"""Runs a model on the rows of an InputBatch, on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

from fd_dsa.attention import (
    CacheLayout,
    DSAAttentionBackend,
    DSABackendConfig,
    StepHints,
)
from fd_dsa.models.config import ModelConfig
from fd_dsa.ops._linear import rows_at
from fd_dsa.runner.forward_meta import RunnerForwardMeta
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.mixin import DSAModelRunnerMixin
from fd_dsa.runner.step_inputs import DeviceInputs, HostInputs, StepInputs


def cache_layout(config: ModelConfig, kv_cache_dtype: str, block_size: int) -> CacheLayout:
    """Cache layout of a model."""
    return CacheLayout(
        kv_cache_dtype,
        block_size,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.index_head_dim,
    )


def backend_config(
    config: ModelConfig, layout: CacheLayout, batch: InputBatch, num_blocks: int | None = None
) -> DSABackendConfig:
    """What the attention backend must know of a model, its caches and the batch it serves."""
    return DSABackendConfig(
        num_heads=config.num_attention_heads,
        index_n_heads=config.index_n_heads,
        index_topk=config.index_topk,
        softmax_scale=config.softmax_scale,
        cache_layout=layout,
        max_num_seqs=batch.max_num_seqs,
        max_num_tokens=batch.max_num_tokens,
        max_blocks_per_seq=batch.block_tables.shape[1],
        num_blocks=num_blocks,
    )


class EmbeddedRunner:
    """Owns the caches and makes a RunnerForwardMeta of the batch; the mixin adds the metadata.

    Args:
        model: a model of `fd_dsa.models.registry`, its weights loaded.
        input_batch: rows that the engine fills.
        layout: of the caches.
        num_blocks: blocks of each cache.
        device: "cpu", "gpu:0" or a custom device of Paddle, where the model already lies.
    """

    def __init__(
        self,
        model: Any,
        input_batch: InputBatch,
        layout: CacheLayout,
        num_blocks: int,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.input_batch = input_batch
        config: ModelConfig = model.config
        self.vocab_size = config.vocab_size
        backend = DSAAttentionBackend(
            backend_config(config, layout, input_batch, num_blocks), device
        )
        self.attn_backends: list[Any] = [backend]
        self.forward_meta: RunnerForwardMeta | None = None
        self._inputs: HostInputs | DeviceInputs = HostInputs(input_batch)
        self._staged: StepInputs | None = None
        allocate = layout.allocate
        if device != "cpu":
            # kernels and their launcher are loaded only where a device is asked for
            from fd_dsa.attention.device import cache_allocator, empty_allocator

            self._inputs = DeviceInputs(input_batch, empty_allocator(device))
            allocate = cache_allocator(layout, device)
        self.caches = self._allocate_caches(backend, allocate, num_blocks)

    def _allocate_caches(
        self, backend: DSAAttentionBackend, allocate: Callable[[list[int]], Any], num_blocks: int
    ) -> list[Any]:
        """Two entries a layer: latents, and indexer keys where the layer has an indexer."""
        latent, _, indexer = backend.get_kv_cache_shape(num_blocks)
        caches: list[Any] = []
        for kind in self.model.config.indexer_types:
            caches.append(allocate(latent))
            caches.append(allocate(indexer) if kind == "full" else None)
        return caches

    def stage_inputs(self, logits_indices: np.ndarray) -> StepInputs:
        """The inputs of the step that the batch holds, where the model runs."""
        self._staged = self._inputs.stage(logits_indices)
        return self._staged

    def initialize_forward_meta(self) -> None:
        """Make `forward_meta` of the rows that the batch holds, staged now or just before."""
        inputs = self._staged or self.stage_inputs(np.empty(0, np.int64))
        self._staged = None
        self.forward_meta = RunnerForwardMeta(
            ids_remove_padding=inputs.ids_remove_padding,
            seq_lens_encoder=inputs.seq_lens_encoder,
            seq_lens_decoder=inputs.seq_lens_decoder,
            seq_lens_this_time=inputs.seq_lens_this_time,
            block_tables=inputs.block_tables,
            caches=self.caches,
            attn_backend=self.attn_backends[0],
        )


class ModelRunner(DSAModelRunnerMixin, EmbeddedRunner):
    """The embedded engine's runner: step metadata once, one forward, logits of chosen tokens."""

    def step_hints(self) -> StepHints:
        """Token counts and longest row, known from scheduling."""
        batch = self.input_batch
        return StepHints(batch.num_tokens, batch.num_prefill_tokens, batch.max_seqlen_k)

    def warm_up(self) -> None:
        """Run prompt chunks of all magnitudes and a decode step: no request waits for kernels.

        A kernel may have another form for other numbers of tokens; its limits are powers of two.
        Results are dropped; what is written to the caches is written again before it is read.
        """
        batch, config = self.input_batch, self.model.config
        longest = batch.block_tables.shape[1] * batch.block_size
        chunk = min(batch.max_num_tokens, longest)
        # past the selection keys are scored and chosen
        cached = min(config.index_topk, longest - 1)
        chunks = [*(1 << i for i in range((chunk - 1).bit_length())), chunk]
        for tokens, done in (*((size, 0) for size in chunks), (1, cached)):
            batch.begin_step()
            batch.set_blocks(0, range(-(-(done + tokens) // batch.block_size)))
            last = batch.add_row(0, [0] * tokens, done, is_prefill=not done)
            self.execute_model(np.array([last]))
        batch.begin_step()
        batch.clear_row(0)

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        """Run the step in the batch.

        Args:
            logits_indices: int64 [n]; flat tokens whose logits are wanted, n may be 0.

        Returns:
            float32 [n, vocab_size].

        Raises:
            ValueError: the batch holds no token, or lengths and tables disagree.
        """
        if self.input_batch.num_tokens == 0:
            raise ValueError("execute_model: the step has no token; call add_row first")
        with paddle.no_grad():
            wanted = self.stage_inputs(logits_indices).logits_indices
            self.initialize_forward_meta()
            hidden = self.model(self.forward_meta.ids_remove_padding, self.forward_meta)
            if not len(logits_indices):
                return np.empty((0, self.vocab_size), np.float32)
            logits = self.model.compute_logits(rows_at(hidden, wanted))
            # on a device this is the step's one wait
            return logits if isinstance(logits, np.ndarray) else logits.numpy()
