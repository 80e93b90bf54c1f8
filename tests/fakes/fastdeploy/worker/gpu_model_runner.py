"""GPUModelRunner (`worker/gpu_model_runner.py`): one rank's buffers, backend, model and steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy import _tree, envs
from fastdeploy._arrays import host
from fastdeploy.cache_manager.v1 import CacheController
from fastdeploy.model_executor.layers.attention import get_attention_backend
from fastdeploy.model_executor.models import ModelRegistry
from fastdeploy.spec_decode import NgramProposer

from ._runner_memory import RunnerMemory
from ._runner_step import RunnerStep
from ._runner_tasks import RunnerTasks
from .checkpoint import read_checkpoint
from .input_batch import make_share_inputs

_ENCODER_BLOCK, _DECODER_BLOCK = 64, 16


class GPUModelRunner(RunnerTasks, RunnerStep, RunnerMemory):
    """Runner that a worker makes with keywords, after device and default dtype."""

    def __init__(
        self, fd_config: Any, device: str, device_id: int, rank: int, local_rank: int
    ) -> None:
        self.fd_config, self.model_config = fd_config, fd_config.model_config
        self.scheduler_config = fd_config.scheduler_config
        self.device, self.device_id = device, device_id
        self.rank, self.local_rank = rank, local_rank
        speculative = fd_config.speculative_config
        self.speculative_method = speculative.method
        self.speculative_decoding = speculative.method is not None
        self.num_draft_tokens = (
            speculative.num_speculative_tokens if self.speculative_decoding else 0
        )
        self.use_cudagraph = fd_config.graph_opt_config.use_cudagraph
        self.num_gpu_blocks = fd_config.cache_config.total_block_num
        self.share_inputs = make_share_inputs(fd_config, self.num_draft_tokens)
        self.forward_meta: Any = None
        self.model: Any = None
        self.proposer: Any = None
        self.exist_prefill_flag = False
        v1 = _tree.current().v1_cache_manager and envs.ENABLE_V1_KVCACHE_MANAGER
        self.enable_cache_manager_v1 = v1
        if v1:
            self.cache_controller = CacheController(fd_config, local_rank, device_id)
        self.real_token_num = 0
        self.saved_output: list[tuple[int, list[int]]] = []
        self._unsaved_output: list[tuple[int, list[int]]] = []
        self._cached_real_bsz = -1
        self.attn_backends: list[Any] = []
        self._initialize_attn_backend()

    def _initialize_attn_backend(self) -> None:
        """The launch buffers, then the backends: one, or one for each layer (#8041)."""
        parallel, model = self.fd_config.parallel_config, self.model_config
        size = parallel.tensor_parallel_size
        num_heads = model.num_attention_heads // size
        kv_num_heads = max(1, model.num_key_value_heads // size)
        # of upstream's twelve launch buffers the one that models read
        self.share_inputs["max_len_tensor_cpu"] = paddle.zeros([6], "int32").cpu()
        for _ in range(model.num_hidden_layers if _tree.current().backend_per_layer else 1):
            backend = get_attention_backend()(
                self.fd_config,
                kv_num_heads=kv_num_heads,
                num_heads=num_heads,
                head_dim=model.head_dim,
                encoder_block_shape_q=_ENCODER_BLOCK,
                decoder_block_shape_q=_DECODER_BLOCK,
            )
            self.attn_backends.append(backend)

    def load_model(self) -> None:
        """The model of the configured architecture, its weights, and the proposer of drafts."""
        self.model = ModelRegistry.get_class(self.model_config.architectures[0])(self.fd_config)
        self.load_weights()
        if self.speculative_decoding:
            self.proposer = NgramProposer(self.num_draft_tokens)

    def load_weights(self) -> None:
        """Fill the parameters from the checkpoint's folder."""
        self.model.load_weights(read_checkpoint(self.model_config.model))

    def exist_prefill(self) -> bool:
        """Return True if a prefill task came in since the last step, which the host knows."""
        return self.exist_prefill_flag

    def not_need_stop(self) -> bool:
        """Return True if a row is active. update_inputs_v1 leaves that on the host."""
        return bool(host(self.share_inputs["seq_lens_this_time"]).any())

    def execute_model(
        self, model_forward_batch: Any = None, num_running_requests: int | None = None
    ) -> None:
        """One step; with the overlap schedule its output is saved by the call after it."""
        if self.scheduler_config.enable_overlap_schedule:
            self.execute_model_overlap()
        else:
            self.execute_model_normal()

    def execute_model_normal(self) -> None:
        """Inputs, model, sampler, state."""
        self._prepare_inputs()
        self._execute()

    def execute_model_overlap(self) -> None:
        """As `execute_model_normal`, with a predicted number of tokens in decode-only steps.

        A row that has stopped, or got fewer drafts, makes the prediction too large.
        """
        saved_before = len(self.saved_output)
        cached = self._cached_real_bsz * (self.num_draft_tokens + 1)
        self._prepare_inputs(cached_token_num=cached, cached_real_bsz=self._cached_real_bsz)
        share = self.share_inputs
        now = host(share["seq_lens_this_time"]).reshape(-1)
        blocked = host(share["is_block_step"])[: len(now)]
        self._cached_real_bsz = int(np.count_nonzero((now > 0) | blocked))
        self._execute()
        made = self.saved_output[saved_before:]
        self.saved_output[saved_before:] = self._unsaved_output
        self._unsaved_output = made

    def _execute(self) -> None:
        """The model and what follows it, unless the rank has nothing to do.

        After the last row has stopped there may still be tokens that were only predicted.
        """
        if self.forward_meta.is_zero_size or not self.not_need_stop():
            if self.fd_config.parallel_config.use_ep:
                self.model.empty_input_forward(self.forward_meta)
            return
        self._pad_and_place()
        self._post_process(self._sample(self._run_model()))
