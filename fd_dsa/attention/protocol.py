"""Interfaces of an attention backend to the runner, to a step and to layers.

    runner     once               allocate_caches
               once a step        build_step
    layer      once a step        forward
    backend    inside of forward  the projections of the layer

Each family of models has its own backend and layers: `DSAAttentionBackend` runs an `MlaLayer`,
`V4AttentionBackend` the layers of DeepSeek-V4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np

from fd_dsa.cache_formats import CacheLayout
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.linear import Linear
from fd_dsa.step import ForwardMeta, StepHints
from fd_dsa.tensor import StepArray

HostLengths = tuple[np.ndarray, ...]
"""Prefill chunk, computed and scheduled tokens of each row in host memory, int32 [B]."""


class PromptLimits(NamedTuple):
    """Largest step with prompts that a graph serves, known instead of the lengths of its rows.

    Attributes:
        num_prompts: prefill rows.
        num_keys: keys that the tokens with dense attention see, in all rows together.
        num_samples: tokens whose logits are computed. A step has at most as many decode tokens.
    """

    num_prompts: int
    num_keys: int
    num_samples: int


class SelectionRecorder(Protocol):
    """Collector of the selections of one step, layer by layer."""

    def add(self, slots: StepArray) -> None:
        """Record the selection of the next layer, int32 [num_tokens, topk], -1 = padding."""


class BackendStep(Protocol):
    """Step as attention backends see it.

    Attributes:
        position_ids, slot_mapping, indexer_attn_mask_offsets: set by the backend, see ForwardMeta.
        fd_dsa_step: metadata of the step, set by the backend.
    """

    position_ids: StepArray
    slot_mapping: StepArray
    indexer_attn_mask_offsets: StepArray
    fd_dsa_step: ForwardMeta | None

    @property
    def caches(self) -> Sequence[Any]:
        """Caches of all layers, in the form that the backend allocates."""


class FilledStep(BackendStep, Protocol):
    """Step of a foreign runner, which has filled the four arrays. B = number of rows.

    Attributes:
        seq_lens_encoder, seq_lens_decoder, seq_lens_this_time: int32 [B]; see ForwardMeta.
        block_tables: int32 [B, max_blocks_per_seq].
    """

    seq_lens_encoder: StepArray
    seq_lens_decoder: StepArray
    seq_lens_this_time: StepArray
    block_tables: StepArray


class LayerStep(BackendStep, Protocol):
    """Step that layers are called with."""

    @property
    def sampled(self) -> StepArray:
        """Flat tokens whose logits are wanted, integers [n]."""

    @property
    def attn_backend(self) -> AttentionBackend:
        """Backend that all layers call."""

    @property
    def selections(self) -> SelectionRecorder | None:
        """Collector of selections, None unless a request asks for them."""


class AttentionBackend(Protocol):
    """Attention of all layers of a model, with the caches and the metadata of a step.

    A backend that derives from this class has all work on one stream, needs no padding, and shows
    no selections, unless it overrides the method.
    """

    @property
    def can_read_selections(self) -> bool:
        """True if the host can read the selections that `forward` returns."""
        return False

    @property
    def max_gathered_keys(self) -> int:
        """Maximum number of keys that prompts with dense attention see at once, 0 without any."""
        return 0

    def padded_tokens(self, num_tokens: int) -> int:
        """Return how many tokens an eager step should have with padding, `num_tokens` or more."""
        return num_tokens

    def allocate_caches(self, has_indexer: Sequence[bool]) -> list[Any]:
        """Allocate the caches of all layers.

        Args:
            has_indexer: for each layer, True if it selects keys itself.
        """

    def build_step(
        self,
        forward_meta: BackendStep,
        inputs: Sequence[StepArray],
        hints: StepHints | None = None,
        host_lengths: HostLengths | PromptLimits | None = None,
    ) -> None:
        """Build the metadata of a step, once for each `forward_meta` object.

        Args:
            forward_meta: step, which every layer is called with.
            inputs: the four arrays of `StepMetadataBuilder.build`, in its order. The snapshot_slots
                of StepInputs follow if the step may write snapshots.
            hints: counts that the host knows of the step.
            host_lengths: lengths of its rows, or their limits in a capture, if the host knows them.

        Raises:
            ValueError: inconsistent lengths or tables, with row and value.
        """

    def forward(
        self,
        # each family of models has its own layers and rotations
        layer: Any,
        hidden: StepArray,
        rotation: Any,
        forward_meta: BackendStep,
        shared: StepArray | None = None,
    ) -> tuple[StepArray, StepArray | None]:
        """Write the keys of a layer, select keys and attend to them.

        Args:
            layer: weights of the layer.
            hidden: [num_tokens, hidden_size], normed.
            rotation: angles of the step's positions.
            forward_meta: step whose metadata was built last.
            shared: selection of an earlier layer, for a layer without an indexer.

        Returns:
            Values of all heads, which the output projection of the layer reads; and the selection.
        """

    def warm_up(self, num_tokens: int, caches: Sequence[Any]) -> None:
        """Make the streams of a step of `num_tokens` tokens, before its capture."""
        return

    def as_captured(self) -> AbstractContextManager[None]:
        """Run the steps inside on the same streams as captured steps."""
        return nullcontext()


class WrittenLayer(Protocol):
    """Layer whose keys are written to caches."""

    @property
    def layer_id(self) -> int:
        """Number of the layer."""

    def cache_write_params(self, layout: CacheLayout) -> CacheWriteParams:
        """Return how the keys of the layer are normed and stored in caches of `layout`."""


class IndexerLayer(Protocol):
    """Projections of a lightning indexer, which selects the keys of a query."""

    @property
    def layer_id(self) -> int:
        """Number of the layer."""

    @property
    def rope_interleave(self) -> bool:
        """Pairing of the RoPE: True pairs neighbours, False (V3.2) pairs the two halves."""

    def project(
        self,
        hidden_states: StepArray,
        by: Callable[..., tuple[StepArray, StepArray]] | None = None,
        out: tuple[StepArray, StepArray] | None = None,
    ) -> tuple[StepArray, StepArray]:
        """Project hidden states to index keys and head weights.

        The call may run alongside other projections, see IndexerOverlap.

        Args:
            hidden_states: [num_tokens, hidden_size], after the input norm.
            by: function of a provider of `indexer_projection` on a device; None on a CPU.
            out: memory of the two results on a device; None on a CPU.

        Returns:
            [num_tokens, index_head_dim], not normed, and arbitrary if the layer projects index keys
            itself; and [num_tokens, index_n_heads].
        """

    def queries(self, latent: StepArray) -> StepArray:
        """Project normed latents [num_tokens, q_lora_rank] to the queries of all heads.

        Returns:
            [num_tokens, index_n_heads, index_head_dim], not rotated.
        """


class MlaLayer(WrittenLayer, Protocol):
    """Projections of a layer with multi-head latent attention.

    Attributes:
        indexer: indexer of the layer, None if it shares the selection of an earlier layer.
        k_b_proj, v_b_proj: up-projections of keys and values, a matrix for each head.
        o_proj: output projection.
    """

    k_b_proj: Linear
    v_b_proj: Linear
    o_proj: Linear

    @property
    def indexer(self) -> IndexerLayer | None: ...

    def project_qkv_a(
        self, hidden_states: StepArray
    ) -> tuple[StepArray, StepArray, StepArray | None]:
        """Project hidden states to the latents of queries and keys.

        Returns:
            [num_tokens, q_lora_rank], normed; [num_tokens, kv_lora_rank + qk_rope_head_dim],
            neither normed nor rotated; and index keys [num_tokens, index_head_dim], or None if the
            indexer must project them.
        """

    def queries(self, latent: StepArray) -> StepArray:
        """Project latents to queries.

        Returns:
            [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim].
        """
