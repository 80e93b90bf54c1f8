"""Caches, dummy runs, captures and weights of the runner (`worker/gpu_model_runner.py`)."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle

from fastdeploy import _memory, _tree
from fastdeploy._arrays import host, writable
from fastdeploy.model_executor.pre_and_post_process import set_row


class RunnerMemory:
    """Part of the runner between the model's load and the first request, and when caches change."""

    is_weight_sleeping = False
    is_kvcache_sleeping = False
    _sent: ClassVar[dict[str, Any]] = {}

    def initialize_kv_cache(self, profile: bool = False) -> None:
        """Two zeroed caches a layer: latents, indexer keys; the value cache is empty.

        DSA's caches are bytes. The loop that creates V0's sets the dtype again for each layer from
        #8060 on, without a word about DSA: upstream's fault.
        """
        if self.enable_cache_manager_v1:
            self.share_inputs["caches"] = self.cache_controller.initialize_kv_cache(
                attn_backend=self.attn_backends, num_gpu_blocks=self.num_gpu_blocks
            )
            return
        dtype, caches = "uint8", []
        for layer in range(self.model_config.num_hidden_layers):
            backend = self.attn_backends[layer if len(self.attn_backends) > 1 else 0]
            backend.layer_id = layer
            key_shape, _, indexer_shape = backend.get_kv_cache_shape(
                max_num_blocks=self.num_gpu_blocks, kv_cache_quant_type="uint8"
            )
            if _tree.current().sliding_windows:
                dtype = self.model_config.dtype
            caches += [paddle.zeros(shape, dtype=dtype) for shape in (key_shape, indexer_shape)]
        self.share_inputs["caches"] = caches

    def clear_cache(self, profile: bool = False) -> None:
        """Give the caches up; a later reader finds poison."""
        caches = list(self.share_inputs.pop("caches"))
        if self.forward_meta is not None:
            self.forward_meta.clear_caches()
        if self.enable_cache_manager_v1:
            self.cache_controller.free_gpu_cache()
            return
        for cache in caches:
            _memory.free(cache)

    def profile_run(self) -> None:
        """The largest step on caches of the size that was asked for, then without them."""
        self.num_gpu_blocks = self.fd_config.cache_config.total_block_num
        self.initialize_kv_cache(profile=True)
        self._dummy_run(
            self.fd_config.get_max_chunk_tokens(), self.fd_config.scheduler_config.max_num_seqs
        )
        self.clear_cache(profile=True)

    def update_share_input_block_num(self, num_gpu_blocks: int) -> None:
        """The real caches, once the memory left is known."""
        self.fd_config.cache_config.total_block_num = num_gpu_blocks
        self.num_gpu_blocks = num_gpu_blocks
        self.initialize_kv_cache()

    def _dummy_prefill_inputs(self, num_tokens: int, batch_size: int, expected: int) -> None:
        """Rows 0 to batch_size - 1 as first chunks over blocks of their own."""
        share, cache = self.share_inputs, self.fd_config.cache_config
        length = max(1, min(num_tokens // batch_size, self.fd_config.model_config.max_model_len))
        length = min(length, self.fd_config.model_config.max_model_len - expected - 1)
        block_num = -(-length // cache.block_size) + cache.enc_dec_block_num
        for row in range(batch_size):
            with writable(share["block_tables"]) as tables:
                tables[row] = -1
                for column in range(min(block_num, tables.shape[1])):
                    # a small test has fewer blocks than a dummy run asks for
                    tables[row, column] = (row * block_num + column) % self.num_gpu_blocks
            for name, value in (
                ("prompt_lens", length),
                ("step_idx", 0),
                ("max_dec_len", expected + 1),
                ("is_chunk_step", False),
            ):
                with writable(share[name]) as values:
                    values.reshape(len(values), -1)[row, 0] = value
            with writable(share["input_ids"]) as ids:
                ids[row, :length] = 5
            set_row(share, row, (length, 0, length), stopped=False)
        share["seq_lens_this_time"] = share["seq_lens_this_time_buffer"]

    def _dummy_run(
        self,
        num_tokens: int,
        batch_size: int,
        expected_decode_len: int = 1,
        in_capturing: bool = False,
        accept_all_drafts: bool = False,
        reject_all_drafts: bool = False,
    ) -> None:
        """One prefill pass, then decode passes until all rows have stopped."""
        self._dummy_prefill_inputs(num_tokens, batch_size, expected_decode_len)
        drafts = None
        if accept_all_drafts or reject_all_drafts:
            drafts = accept_all_drafts
        while True:
            self._prepare_inputs(is_dummy_or_profile_run=True)
            meta = self.forward_meta
            meta.step_use_cudagraph = in_capturing and meta.step_use_cudagraph
            self._pad_and_place()
            self._post_process(self._sample(self._run_model(), drafts))
            if not host(self.share_inputs["seq_lens_this_time_buffer"]).any():
                break
        self.saved_output.clear()
        with writable(self.share_inputs["block_tables"]) as tables:
            tables[...] = -1

    def capture_model(self) -> None:
        """Graphs of all sizes, the largest first; with drafts a row has several tokens."""
        if not self.use_cudagraph:
            return
        per_row = self.num_draft_tokens + 1
        for size in sorted(self.fd_config.graph_opt_config.cudagraph_capture_sizes, reverse=True):
            batch_size = min(size // per_row, self.fd_config.scheduler_config.max_num_seqs)
            if batch_size * per_row != size:
                continue
            # a prefill pass has more tokens than any graph
            tokens = self.fd_config.graph_opt_config.max_capture_size + batch_size
            self._dummy_run(
                tokens,
                batch_size,
                expected_decode_len=per_row,
                in_capturing=True,
                accept_all_drafts=True,
            )

    def sleep(self, tags: str) -> None:
        """Give up what the comma-separated tags name; nothing where the first of it is given up.

        The order and the early ends are those of `worker/gpu_model_runner.py` at 39d329f2.
        """
        if "weight" in tags.split(","):
            if self.is_weight_sleeping:
                return
            self._clear_graphs()
            self._clear_model_weight()
            self.is_weight_sleeping = True
        if "kv_cache" in tags.split(","):
            if self.is_kvcache_sleeping:
                return
            self.clear_cache()
            self.is_kvcache_sleeping = True

    def wakeup(self, tags: str) -> None:
        """Caches first, then weights, and graphs of both."""
        if tags == "weight" and self.use_cudagraph and self.is_kvcache_sleeping:
            raise RuntimeError("wake up [kv_cache] first: a graph cannot be captured without it")
        if "kv_cache" in tags.split(","):
            if not self.is_kvcache_sleeping:
                return
            self.initialize_kv_cache()
            self.is_kvcache_sleeping = False
        if "weight" in tags.split(","):
            if not self.is_weight_sleeping:
                return
            self._reload_model_weights()
            self.capture_model()
            self.is_weight_sleeping = False

    def clear_parameters(self, pid: int = 0) -> None:
        """Before reinforcement learning brings new weights."""
        self._clear_graphs()
        self._clear_model_weight()
        self.clear_cache()

    def update_parameters(self, pid: int = 0) -> None:
        """New weights, new caches, new graphs."""
        self._reload_model_weights()
        self.initialize_kv_cache()
        self.capture_model()

    def update_weights(self, version: str | None = None) -> None:
        """New weights at the same addresses; caches and graphs stay."""
        self.load_weights()

    def _clear_model_weight(self) -> None:
        """Take the memory of all parameters and buffers (`rl/dynamic_weight_manager.py`)."""
        state = self.model.state_dict()
        self._sent = {name: tensor.clone() for name, tensor in state.items()}
        for tensor in state.values():
            tensor._clear_data()

    def _reload_model_weights(self) -> None:
        """Put other memory in its place, as the trainer's arrives; then what the folder has."""
        state = self.model.state_dict()
        for name, tensor in self._sent.items():
            tensor._share_buffer_to(state[name])
        self.load_weights()

    def _clear_graphs(self) -> None:
        if self.use_cudagraph:
            self.model.clear_graph_opt_backend()
