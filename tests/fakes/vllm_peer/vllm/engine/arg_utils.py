"""Options of an engine (`vllm/engine/arg_utils.py`)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EngineArgs:
    """The fields that the benchmark sets, in vLLM's order."""

    model: str = "Qwen/Qwen3-0.6B"
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    kv_cache_dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    disable_log_stats: bool = False
    compilation_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class AsyncEngineArgs(EngineArgs):
    """Options of an engine whose client is asynchronous."""

    enable_log_requests: bool = False
