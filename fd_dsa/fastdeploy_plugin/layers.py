"""FastDeploy's Indexer and DeepseekV32DSAAttention with their parameters and fd_dsa's forward.

The backend prepares the shared state of a step before its first layer runs. A layer only launches:
it neither waits for the device nor reads a value from it.

Source of names, shapes and the order of calls: FastDeploy's `model_executor/models/deepseek_v3.py`;
of the method: DeepSeek-V3.2 (arXiv 2512.02556) §2 and DeepSeek-V2 (arXiv 2405.04434) §2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.errors import MissingStepError
from fd_dsa.fastdeploy_plugin.backend import PluginBackend
from fd_dsa.fastdeploy_plugin.settings import interleaves_indexer_rope, shares_selection
from fd_dsa.fastdeploy_plugin.upstream import FDConfig, ForwardMeta
from fd_dsa.ops.mla_query import prepare_mla_query
from fd_dsa.ops.providers import selected_function
from fd_dsa.tensor import Tensor

if TYPE_CHECKING:
    from fd_dsa.fastdeploy_plugin.upstream import AdoptedIndexer, Attention
else:
    # `take_over` derives from FastDeploy's own classes
    AdoptedIndexer = Attention = object

# buffers of FastDeploy's indexer, [max_model_len] on the device, which only its own forward reads
_UNUSED_BUFFERS = ("offsets", "lengths")


def _backend_of(forward_meta: ForwardMeta) -> PluginBackend:
    """Return the backend of a step.

    Raises:
        MissingStepError: the runner has FastDeploy's own backend.
    """
    backend = forward_meta.attn_backend
    if not isinstance(backend, PluginBackend):
        raise MissingStepError(
            f"forward_meta.attn_backend is a {type(backend).__name__}, allowed is fd_dsa's own: "
            "the runner was made before FastDeploy loaded the plug-in; load it first"
        )
    return backend


class PluginIndexer(AdoptedIndexer):
    """Lightning indexer: selects the past tokens that a query attends to."""

    def adopt(self, fd_config: FDConfig) -> None:
        """Complete a layer that FastDeploy has constructed."""
        for name in _UNUSED_BUFFERS:
            if hasattr(self, name):
                delattr(self, name)
        self.rope_interleave = interleaves_indexer_rope(fd_config.model_config)
        self.weights_scale = self.index_n_heads**-0.5 * self.index_head_dim**-0.5

    def select(
        self,
        backend: PluginBackend,
        forward_meta: ForwardMeta,
        qr: Tensor,
        weights: Tensor,
        table: Tensor,
    ) -> Any:
        """Select the cache slots of each token, after the step's index keys are in the cache.

        Args:
            qr: [num_tokens, q_lora_rank], normed.
            weights: [num_tokens, index_n_heads], result of `weights_proj`.
            table: cos and sin by position.

        Returns:
            int32 [num_tokens, topk]; physical slots in ascending position, -1 = padding.
        """
        core = backend.current_core()
        q, weights = selected_function("indexer_query", qr)(
            self.wq_b(qr).reshape([-1, self.index_n_heads, self.index_head_dim]),
            weights,
            core.current_step(forward_meta).position_ids,
            table,
            rope_interleave=self.rope_interleave,
            **backend.config.query_format,
            weights_scale=self.weights_scale,
            out=core.attention.query_buffers(qr.shape[0]),
        )
        return core.select(q, weights, self.layer_id, forward_meta)


class PluginAttention(Attention):
    """Multi-head latent attention, absorbed, over the keys that an indexer selected."""

    def adopt(self, fd_config: FDConfig) -> None:
        """Complete a layer that FastDeploy has constructed."""
        self.layer_id = self.indexer.layer_id
        self.shares_selection = shares_selection(fd_config, self.layer_id)

    def forward(
        self, forward_meta: ForwardMeta, hidden_states: Tensor, *_: object, **__: object
    ) -> Any:
        """Return the attention output, [num_tokens, hidden_size] like the normed `hidden_states`.

        Further arguments of a newer tree are ignored, because `forward_meta` holds the step.
        """
        if hidden_states.shape[0] == 0:
            return hidden_states
        backend = _backend_of(forward_meta)
        if self.shares_selection:
            qr, kv_a = self._down_projected(hidden_states)
            self._write(backend, kv_a, None, forward_meta)
        else:
            qr = self._select(backend, hidden_states, forward_meta)
        query = self._absorbed_query(backend, qr, forward_meta)
        selection, core = backend.shared_selection, backend.current_core()
        latent = core.attend(query, selection, self.layer_id, forward_meta)
        by_head = latent.reshape([-1, self.num_attention_heads_tp, self.kv_lora_rank])
        values = self.kv_b_proj_bmm(by_head.transpose([1, 0, 2]), proj_type="v")
        width = self.num_attention_heads_tp * self.v_head_dim
        return self.o_proj(values.transpose([1, 0, 2]).reshape([-1, width]))

    def _select(
        self, backend: PluginBackend, hidden_states: Tensor, forward_meta: ForwardMeta
    ) -> Any:
        """Write the keys of the step, select keys, and return the queries' latent."""
        projections = backend.projections_of(self.indexer, hidden_states)
        core = backend.current_core()
        project: Callable[..., tuple[Tensor, Tensor]] = projections.two_gemms
        num_tokens = 0
        args: list[Any] = [hidden_states]
        # only one launch may run on a second stream, because it makes no temporaries
        if projections.is_one_launch:
            project, num_tokens = projections.one_launch, hidden_states.shape[0]
            args.append(core.attention.projection_buffers(num_tokens))
        work = partial(self._down_projected, hidden_states)
        (qr, kv_a), (index_k, weights) = core.overlap.run(
            num_tokens, work, project, *args, refuse=projections.refuse
        )
        self._write(backend, kv_a, index_k, forward_meta)
        table = backend.cos_sin_of(self.indexer_rotary_emb)
        backend.shared_selection = self.indexer.select(backend, forward_meta, qr, weights, table)
        return qr

    def _down_projected(self, hidden_states: Tensor) -> tuple[Any, Any]:
        """Return the normed latent of the queries, and that of the keys, only projected."""
        qkv = self.qkv_a_proj_with_mqa(hidden_states)
        return self.q_a_layernorm(qkv[:, : self.q_lora_rank])[0], qkv[:, self.q_lora_rank :]

    def _write(
        self,
        backend: PluginBackend,
        kv_a: Tensor | None,
        index_k: Tensor | None,
        forward_meta: ForwardMeta,
    ) -> None:
        """Write both keys of the layer to their caches, in one launch."""
        indexer = None if index_k is None else self.indexer
        norms = backend.norms_of(self.layer_id, self.kv_a_layernorm, indexer)
        table = backend.cos_sin_of(self.rotary_emb)
        backend.write_layer(kv_a, index_k, table, norms, self.layer_id, forward_meta)

    def _absorbed_query(self, backend: PluginBackend, qr: Tensor, forward_meta: ForwardMeta) -> Any:
        """Return the query [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim], rotated."""
        core = backend.current_core()
        q = self.q_b_proj(qr).reshape([-1, self.num_attention_heads_tp, self.qk_head_dim])
        q_nope, q_pe = q[:, :, : self.qk_nope_head_dim], q[:, :, self.qk_nope_head_dim :]
        q_latent = self.kv_b_proj_bmm(q_nope.transpose([1, 0, 2]), proj_type="k")
        query = prepare_mla_query(
            q_latent.transpose([1, 0, 2]),
            q_pe,
            core.current_step(forward_meta).position_ids,
            backend.cos_sin_of(self.rotary_emb),
            out=core.attention.mla_query_buffer(q.shape[0]),
        )
        return as_tensor(query) if isinstance(query, np.ndarray) else query
