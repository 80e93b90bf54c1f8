"""From a configuration to an engine that runs: folder, memory, model, caches."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fd_dsa.config import EngineConfig
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import prepare_cpu_runtime, set_cpu_threads
from fd_dsa.errors import BackendUnavailable, ConfigError

if TYPE_CHECKING:
    from fd_dsa.attention import CacheLayout, DSABackendConfig
    from fd_dsa.models.config import ModelConfig
    from fd_dsa.models.memory_plan import MemoryPlan

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> LLMEngine:
    """An engine over the model of `config`, ready for requests.

    Everything that can be refused is refused before memory is taken: first the folder's files
    are read and compared, then memory is planned, and only then the weights are loaded.

    Raises:
        ConfigError: a flag, the folder, its checkpoint or the memory; says which and what to do.
        BackendUnavailable: Paddle is missing, or has no such device.
    """
    _check_paddle()
    prepare_cpu_runtime()
    # these import paddle, which reads its settings from the environment when it is imported
    from fd_dsa.models.config import ModelConfig
    from fd_dsa.ops._fixed_order import check_fixed_order
    from fd_dsa.runner.device import resolve_device
    from fd_dsa.runner.input_batch import InputBatch
    from fd_dsa.runner.model_runner import ModelRunner, backend_config, cache_layout

    threads = set_cpu_threads()
    device = resolve_device(config.device)
    check_fixed_order(device)
    model_config = ModelConfig.from_folder(config.model_path)
    defaults = sampling_defaults(config, model_config)
    max_model_len = config.resolve_max_model_len(model_config.max_position_embeddings)
    layout = cache_layout(model_config, config.cache_dtype, config.block_size)
    tokenizer = Tokenizer.from_folder(config.model_path)
    where = f"the CPU, {threads} threads" if device == "cpu" else device
    logger.info("%s on %s", model_config.model_type, where)
    max_blocks_per_seq = -(-max_model_len // config.block_size)
    input_batch = InputBatch(
        config.max_num_seqs, config.num_batched_tokens, max_blocks_per_seq, config.block_size
    )
    room = _device_room(device, backend_config(model_config, layout, input_batch))
    model, plan = _load_model(config, model_config, layout, max_model_len, room)
    if device != "cpu":
        model.to_device(device)
    runner = ModelRunner(model, input_batch, layout, plan.num_blocks, device)
    if device != "cpu":
        _warm_up(runner)
    return LLMEngine(
        runner,
        tokenizer,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.num_batched_tokens,
        eos_token_ids=model_config.eos_token_ids,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
        sampling_defaults=defaults,
    )


def _check_paddle() -> None:
    """Refuse to start without Paddle, in one line that says what to install."""
    if find_spec("paddle") is None:
        raise BackendUnavailable(
            "paddle is not installed; for a CPU run: pip install 'fd_dsa[cpu]' "
            "(for a GPU install paddlepaddle-gpu from Paddle's own package index)"
        )


def _warm_up(runner: Any) -> None:
    """Compile the kernels of a device; where they are interpreted there is nothing to compile."""
    from fd_dsa.triton_runtime import INTERPRETING

    if INTERPRETING:
        return
    start = time.perf_counter()
    runner.warm_up()
    logger.info("kernels ready after %.1f s", time.perf_counter() - start)


def _device_room(device: str, backend: DSABackendConfig) -> dict[str, int]:
    """What `plan_memory` must know of a device; nothing where its memory is the host's."""
    from fd_dsa.runner.device import free_device_bytes

    free_bytes = free_device_bytes(device)
    if free_bytes is None:
        return {}
    from fd_dsa.attention.device import workspace_bytes

    # no cap: memory of a device that the engine leaves is used by nobody else
    room = max(free_bytes - workspace_bytes(backend), 0)
    return {"free_bytes": room, "default_cache_bytes": free_bytes}


def _load_model(
    config: EngineConfig,
    model_config: ModelConfig,
    layout: CacheLayout,
    max_model_len: int,
    room: dict[str, int],
) -> tuple[Any, MemoryPlan]:
    """The model with its weights, in host memory, and how the memory is shared out."""
    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.loader import load_weights, validate
    from fd_dsa.models.memory_plan import check_host_room, plan_memory, weight_bytes
    from fd_dsa.models.progress import LoadProgress
    from fd_dsa.models.registry import create_model

    bytes_per_block = layout.bytes_per_block(
        model_config.num_hidden_layers, model_config.num_indexer_layers
    )
    with Checkpoint.open(config.model_path) as checkpoint:
        validate(checkpoint, model_config)
        plan = plan_memory(
            config,
            weight_bytes=weight_bytes(model_config),
            bytes_per_block=bytes_per_block,
            max_model_len=max_model_len,
            **room,
        )
        logger.info("%s", plan.summary())
        if room:
            check_host_room(plan.weight_bytes)
        model = create_model(model_config)
        with LoadProgress() as progress:
            load_weights(checkpoint, model_config, model.weight_loaders(), progress)
    return model, plan


def sampling_defaults(config: EngineConfig, model_config: ModelConfig) -> dict[str, Any]:
    """What generation_config.json proposes for parameters that a request leaves out.

    Raises:
        ConfigError: a proposal that no request could make; names the file.
    """
    names = ("temperature", "top_p", "top_k")
    proposed = {name: getattr(model_config.generation, name) for name in names}
    defaults = {name: value for name, value in proposed.items() if value is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ConfigError(f"{config.model_path / 'generation_config.json'}: {error}") from error
    if defaults:
        logger.info("sampling defaults of generation_config.json: %s", defaults)
    return defaults
