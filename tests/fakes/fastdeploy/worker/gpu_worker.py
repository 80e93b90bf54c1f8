"""GpuWorker (`worker/gpu_worker.py`): loads the runner's plug-in once, when it is imported."""

from __future__ import annotations

from typing import Any

import paddle

from fastdeploy import _tree
from fastdeploy.plugins.model_runner import load_model_runner_plugins
from fastdeploy.utils import llm_logger

try:
    ModelRunner = load_model_runner_plugins()
# whatever goes wrong with the plug-in, upstream goes on without it and without a word
except:  # noqa: E722
    from fastdeploy.worker.gpu_model_runner import GPUModelRunner as ModelRunner


class GpuWorker:
    """One process of one GPU, as the engine drives it."""

    def __init__(self, fd_config: Any, local_rank: int = 0, rank: int = 0) -> None:
        self.fd_config, self.local_rank, self.rank = fd_config, local_rank, rank
        self.model_runner: Any = None

    def init_device(self) -> None:
        """Set device and default dtype, then make the runner, by keywords alone."""
        paddle.set_device(_tree.place())
        paddle.set_default_dtype(self.fd_config.model_config.dtype)
        self.model_runner = ModelRunner(
            fd_config=self.fd_config,
            device=f"gpu:{self.local_rank}",
            device_id=self.local_rank,
            rank=self.rank,
            local_rank=self.local_rank,
        )
        llm_logger.info("runner: %s", type(self.model_runner).__name__)

    def load_model(self) -> None:
        self.model_runner.load_model()

    def determine_available_memory(self) -> int:
        """Bytes left for caches after the largest step; here always the same."""
        self.model_runner.profile_run()
        return 1 << 30

    def initialize_cache(self, num_gpu_blocks: int) -> None:
        self.model_runner.update_share_input_block_num(num_gpu_blocks)

    def graph_optimize_and_warm_up_model(self) -> None:
        """Graphs of decode steps."""
        self.model_runner.capture_model()

    def preprocess_new_task(self, req_dicts: list[Any], num_running_requests: int) -> None:
        self.model_runner.insert_tasks_v1(req_dicts, num_running_requests)

    def execute_model(self, model_forward_batch: Any, num_running_requests: int) -> None:
        self.model_runner.execute_model(model_forward_batch, num_running_requests)
