"""One step of the runner, from its inputs to the state after it (`worker/gpu_model_runner.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy._arrays import host, writable
from fastdeploy.model_executor.forward_meta import ForwardMeta
from fastdeploy.model_executor.layers.attention import DSAAttentionBackend, MLAAttentionBackend
from fastdeploy.model_executor.pre_and_post_process import (
    pre_process,
    recover_decode_task,
    update_inputs_v1,
)


class RunnerStep:
    """Inputs, ForwardMeta, the model's call, the sampler and the state after it.

    Attributes:
        saved_output: (row, accepted tokens) of each row that made some, step after step.
    """

    def _prepare_inputs(
        self,
        cached_token_num: int = -1,
        cached_real_bsz: int = -1,
        is_dummy_or_profile_run: bool = False,
    ) -> tuple[int, Any]:
        """Everything before the model; launched tokens, and the event of the host copies."""
        token_num = self._step_inputs(cached_token_num, is_dummy_or_profile_run)
        return token_num, object()

    def _step_inputs(self, cached_token_num: int, is_dummy_or_profile_run: bool) -> int:
        share = self.share_inputs
        recover_decode_task(share, self.fd_config.cache_config.block_size)
        now = share["seq_lens_this_time"]
        token_num = self._resolve_current_launch_token_num(cached_token_num)
        ids, rows, cu_q, cu_k = pre_process(
            token_num,
            share["input_ids"],
            now,
            self.speculative_decoding,
            share["draft_tokens"] if self.speculative_decoding else None,
            share["seq_lens_encoder"],
            share["seq_lens_decoder"],
        )
        share["ids_remove_padding"].copy_(ids, False)
        # wipes what the step before used, no more: the buffer has its shape
        share["batch_id_per_token"].copy_(paddle.full_like(share["batch_id_per_token"], -1), False)
        share["batch_id_per_token"].copy_(rows, False)
        share["cu_seqlens_q"].copy_(cu_q, False)
        share["cu_seqlens_k"].copy_(cu_k, False)
        self.initialize_forward_meta(is_dummy_or_profile_run=is_dummy_or_profile_run)
        return token_num

    def _resolve_current_launch_token_num(self, cached_token_num: int) -> int:
        """The predicted count of a decode-only step, else the true one, for which it waits."""
        now = host(self.share_inputs["seq_lens_this_time"]).reshape(-1)
        with writable(self.share_inputs["seq_lens_this_time_cpu"]) as copy:
            copy[: len(now), 0] = now
        if cached_token_num >= 0 and not self.exist_prefill():
            return cached_token_num
        return int(now.sum())

    def initialize_forward_meta(self, is_dummy_or_profile_run: bool = False) -> None:
        """A new ForwardMeta with the buffers of the step, and every backend's metadata."""
        share, backend = self.share_inputs, self.attn_backends[0]
        now = share["seq_lens_this_time"]
        rows = now.shape[0]
        per_row = ("seq_lens_encoder", "seq_lens_decoder", "block_tables")
        self.forward_meta = ForwardMeta(
            ids_remove_padding=share["ids_remove_padding"],
            attn_backend=backend,
            seq_lens_this_time=now,
            batch_id_per_token=share["batch_id_per_token"],
            cu_seqlens_q=share["cu_seqlens_q"],
            cu_seqlens_k=share["cu_seqlens_k"],
            caches=share.get("caches"),
            **{name: share[name][:rows] for name in per_row},
            max_len_tensor_cpu=share["max_len_tensor_cpu"],
        )
        self.forward_meta.attn_backends = self.attn_backends
        self.collect_distributed_status()
        self.forward_meta.is_dummy_or_profile_run = is_dummy_or_profile_run
        for one in self.attn_backends:
            one.init_attention_metadata(self.forward_meta)
        self.forward_meta.is_zero_size = self.forward_meta.ids_remove_padding.shape[0] == 0
        self.forward_meta.exist_prefill = self.exist_prefill()

    def collect_distributed_status(self) -> None:
        """Decide if the step may be a graph: decode-only ones, with a split graph all of them."""
        config = self.fd_config.graph_opt_config
        split = config.graph_opt_level > 0 and not config.full_cuda_graph
        wanted = not self._has_prefill_rows() or split
        self.forward_meta.step_use_cudagraph = self.use_cudagraph and wanted

    def _has_prefill_rows(self) -> bool:
        """Return True if a row has prompt tokens. In a dummy run's first pass a row has some."""
        return bool((host(self.share_inputs["seq_lens_encoder"]) > 0).any())

    def _pad_and_place(self) -> None:
        """Run the part between a step's preparation and its model.

        In this order in `worker/gpu_model_runner.py` at 39d329f2 (June 2026).
        """
        self.padding_cudagraph_inputs()
        self._compute_position_ids_and_slot_mapping()

    def _compute_position_ids_and_slot_mapping(self) -> None:
        """Positions and slots once a step (#7367), whatever the backend has made before.

        Upstream's give padding the slots of the last row; the double has none of its kernels.
        """
        if not isinstance(self.attn_backends[0], (MLAAttentionBackend, DSAAttentionBackend)):
            return
        self.forward_meta.position_ids = self.share_inputs["position_ids_buffer"]
        self.forward_meta.slot_mapping = self.share_inputs["slot_mapping_buffer"]
        raise NotImplementedError("the double has none of FastDeploy's position kernels")

    def padding_cudagraph_inputs(self) -> None:
        """Nothing is padded; the true count is kept, for the output to be cut to it."""
        self.real_token_num = self.forward_meta.ids_remove_padding.shape[0]

    def _run_model(self) -> Any:
        """Hidden states of the launched tokens."""
        ids = self.share_inputs["ids_remove_padding"]
        with paddle.no_grad():
            out = self.model({"ids_remove_padding": ids}, self.forward_meta)
        return out[: self.real_token_num] if self.use_cudagraph else out

    def _sample(self, hidden: Any, drafts: bool | None = None) -> dict[int, list[int]]:
        """Accepted tokens of each row that ran: greedy, drafts compared with what follows them.

        Args:
            drafts: in dummy runs, whether all of them or none are accepted.
        """
        with paddle.no_grad():
            now, encoder, starts = (
                host(self.share_inputs[name]).reshape(-1)
                for name in ("seq_lens_this_time", "seq_lens_encoder", "cu_seqlens_q")
            )
            best, accepted = {}, {}
            for row in np.flatnonzero(now):
                count = 1 if encoder[row] or not self.speculative_decoding else int(now[row])
                last = int(starts[row] + now[row])
                best[int(row)] = hidden[last - count : last]
            if not best:
                return {}
            logits = self.model.compute_logits(paddle.concat(list(best.values())))
            tokens = host(logits).argmax(axis=1).tolist()
            for row, states in best.items():
                own, tokens = tokens[: states.shape[0]], tokens[states.shape[0] :]
                accepted[row] = self._accepted(row, own, drafts)
            return accepted

    def _accepted(self, row: int, tokens: list[int], drafts: bool | None) -> list[int]:
        """The tokens up to the first one whose draft was another."""
        count = 1
        while count < len(tokens):
            draft = int(host(self.share_inputs["draft_tokens"])[row, count])
            if not (draft == tokens[count - 1] if drafts is None else drafts):
                break
            count += 1
        return tokens[:count]

    def _post_process(self, tokens: dict[int, list[int]]) -> None:
        """Stop flags, output, the rows' next states, and drafts for them."""
        share = self.share_inputs
        chunks = host(share["is_chunk_step"])
        tokens = {row: made for row, made in tokens.items() if not chunks[row]}
        for row, made in tokens.items():
            with writable(share["step_idx"]) as steps, writable(share["stop_flags"]) as stops:
                left = int(host(share["max_dec_len"])[row, 0] - steps[row, 0])
                del made[left:]
                steps[row, 0] += len(made)
                stops[row, 0] = left <= len(made)
            self.saved_output.append((row, list(made)))
        update_inputs_v1(share, tokens, self.fd_config.cache_config.block_size)
        if self.speculative_decoding:
            self.proposer.run(share_inputs=share, accepted=tokens)
        self.exist_prefill_flag = False
