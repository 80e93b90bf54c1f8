"""From a configuration to an engine that runs: folder, memory, model, caches."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from fd_dsa.config import EngineConfig, prepare_cpu_runtime, set_cpu_threads
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import BackendUnavailable

logger = logging.getLogger(__name__)


def check_paddle() -> None:
    """Refuse to start without Paddle.

    Raises:
        BackendUnavailable: says which extra to install.
    """
    if find_spec("paddle") is None:
        raise BackendUnavailable(
            "paddle is not installed; for a CPU run: pip install 'fd_dsa[cpu]' "
            "(for a GPU install paddlepaddle-gpu from Paddle's own package index)"
        )


def build_engine(config: EngineConfig) -> LLMEngine:
    """An engine over the model of `config`, ready for requests.

    Everything that can be refused is refused before memory is taken: first the folder's files
    are read and compared, then memory is planned, and only then the weights are loaded.

    Raises:
        ConfigError: a flag, the folder, its checkpoint or the memory; says which and what to do.
        BackendUnavailable: Paddle is missing.
    """
    check_paddle()
    prepare_cpu_runtime()
    # these import paddle, which reads its settings from the environment when it is imported
    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.config import ModelConfig
    from fd_dsa.models.loader import load_weights, validate
    from fd_dsa.models.memory_plan import plan_memory, weight_bytes
    from fd_dsa.models.progress import LoadProgress
    from fd_dsa.models.registry import create_model
    from fd_dsa.runner.input_batch import InputBatch
    from fd_dsa.runner.model_runner import ModelRunner, cache_layout

    threads = set_cpu_threads()
    folder = config.model_path
    model_config = ModelConfig.from_folder(folder)
    max_model_len = config.resolve_max_model_len(model_config.max_position_embeddings)
    layout = cache_layout(model_config, config.cache_dtype, config.block_size)
    tokenizer = Tokenizer.from_folder(folder)
    with Checkpoint.open(folder) as checkpoint:
        validate(checkpoint, model_config)
        plan = plan_memory(
            config,
            weight_bytes=weight_bytes(model_config),
            bytes_per_block=layout.bytes_per_block(
                model_config.num_hidden_layers, model_config.num_indexer_layers
            ),
            max_model_len=max_model_len,
        )
        logger.info(
            "%s on the CPU, %d threads; %s", model_config.model_type, threads, plan.summary()
        )
        model = create_model(model_config)
        with LoadProgress() as progress:
            load_weights(checkpoint, model_config, model.weight_loaders(), progress)
    input_batch = InputBatch(
        config.max_num_seqs,
        config.num_batched_tokens,
        -(-max_model_len // config.block_size),
        config.block_size,
    )
    return LLMEngine(
        ModelRunner(model, input_batch, layout, plan.num_blocks),
        tokenizer,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.num_batched_tokens,
        eos_token_ids=model_config.eos_token_ids,
        seed=config.seed,
    )
