"""What an engine will be, before memory is taken: device, folder, limits, sizes.

Everything that can be refused is refused here.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.commands import extra_command, pip_command
from fd_dsa.config import EngineConfig
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import prepare_cpu_runtime, set_cpu_threads, usable_cpus
from fd_dsa.errors import BackendUnavailable, ConfigError

if TYPE_CHECKING:
    from fd_dsa.distributed import Group
    from fd_dsa.engine.caches import Caches
    from fd_dsa.models.memory_plan import MemoryPlan
    from fd_dsa.runner.input_batch import InputBatch

logger = logging.getLogger(__name__)

_OLDEST_PADDLE = (3, 3)


@dataclass(frozen=True)
class EnginePlan:
    """All that is decided before weights are loaded.

    Attributes:
        config: as asked for, with the device and the types that this means here.
        model_config: of the folder, of its family's class; with several ranks, of one of them.
        whole_config: of the whole model.
        device: "cpu", "gpu:0" or a custom device of Paddle.
        num_threads: of Paddle's CPU kernels.
        max_model_len: longest prompt plus output, tokens.
        caches: sizes of the caches, and the attention backend.
        tokenizer: of the folder.
        input_batch: rows of a step, empty.
        sampling_defaults: what the folder proposes.
        memory: sizes of weights and caches, bytes.
        fp8: names of the tensors that a device holds as FP8.
    """

    config: EngineConfig
    model_config: Any
    whole_config: Any
    device: str
    num_threads: int
    max_model_len: int
    caches: Caches
    tokenizer: Tokenizer
    input_batch: InputBatch
    sampling_defaults: dict[str, Any]
    memory: MemoryPlan
    fp8: frozenset[str]

    def summary(self) -> str:
        """Model, device and limits in one line."""
        where = f"the CPU, {self.num_threads} threads" if self.device == "cpu" else self.device
        if self.config.tensor_parallel_size > 1:
            where += f", rank 0 of {self.config.tensor_parallel_size}"
        model = self.model_config
        return (
            f"{model.model_type} on {where}: {model.num_hidden_layers} layers, "
            f"{self.config.dtype}, caches in {self.config.kv_cache_dtype}, "
            f"index_topk {model.index_topk}, max_model_len {self.max_model_len}"
        )

    def describe(self) -> dict[str, Any]:
        """Every value that was chosen or resolved, for people and programs."""
        config = self.config
        return {
            "model": str(config.model_path),
            "model_type": self.model_config.model_type,
            "tokenizer": str(config.tokenizer_path),
            "load_format": config.load_format,
            "served_model_name": list(config.served_model_name),
            "device": self.device,
            "tensor_parallel_size": config.tensor_parallel_size,
            "dtype": config.dtype,
            "kv_cache_dtype": config.kv_cache_dtype,
            "block_size": config.block_size,
            "enable_prefix_caching": config.enable_prefix_caching,
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.num_batched_tokens,
            "target_inter_token_latency_ms": config.target_inter_token_latency_ms,
            "index_topk": self.model_config.index_topk,
            "speculative_config": config.speculation and asdict(config.speculation),
            "seed": config.seed,
            "sampling_defaults": self.sampling_defaults,
            "memory": {
                "weight_bytes": self.memory.weight_bytes,
                "kv_cache_bytes": self.memory.kv_cache_bytes,
                "bytes_per_block": self.memory.bytes_per_block,
                "state_bytes": self.memory.state_bytes,
                "num_blocks": self.memory.num_blocks,
                "num_tokens": self.memory.num_blocks * self.memory.block_size,
                "free_bytes": self.memory.free_bytes,
            },
        }


def make_plan(config: EngineConfig, group: Group | None = None) -> EnginePlan:
    """What an engine of `config` will be.

    First the folder's files are read and compared, then memory is planned; none is taken. Call it
    before anything that imports paddle: that reads its settings from the environment.

    Args:
        group: the ranks that share the model, each of which makes its plan now; None: this process
            alone plans, as rank 0.

    Raises:
        ConfigError: a flag, the folder, its checkpoint or the memory; says which and what to do.
        BackendUnavailable: Paddle is missing or too old, or has no such device.
    """
    _prepare_paddle()
    # these import paddle
    from fd_dsa.device.resolve import device_of_rank, keep_float32, resolve_device
    from fd_dsa.engine.caches import family_of
    from fd_dsa.models.configs import open_checkpoint, read_config
    from fd_dsa.models.loader import (
        add_mtp_layer,
        check_blocks,
        fp8_tensors,
        quantisable_tensors,
        validate,
    )
    from fd_dsa.ops.fixed_order import check_fixed_order
    from fd_dsa.runner.input_batch import InputBatch

    size = config.tensor_parallel_size
    threads = set_cpu_threads(max(usable_cpus() // size, 1))
    device = resolve_device(config.device)
    if size > 1:
        device = device_of_rank(device, group.rank if group else 0, size)
    config = config.on_device(device)
    has_fp8 = device == "cpu" or _check_capability(config)
    keep_float32(device)
    check_fixed_order(device, size)
    model_config = read_config(config.model_path, allow_unknown=config.allow_unknown_config_fields)
    if model_config.unknown_fields and (group is None or group.rank == 0):
        names = ", ".join(model_config.unknown_fields)
        logger.warning("%s: unknown fields of config.json, ignored: %s", config.model, names)
    family = family_of(model_config)
    family.check_flags(config, model_config)
    model_config = _with_index_topk(model_config, config.index_topk)
    defaults = sampling_defaults(config, model_config)
    max_model_len = config.resolve_max_model_len(model_config.max_position_embeddings)
    tokenizer = Tokenizer.from_folder(config.tokenizer_path, config.chat_template)
    _check_vocabulary(config, model_config, tokenizer)
    blocks_per_seq = -(-max_model_len // config.block_size)
    input_batch = InputBatch(
        config.max_num_seqs, config.num_batched_tokens, blocks_per_seq, config.block_size
    )
    wants_mtp = config.speculation is not None and config.speculation.method == "mtp"
    if config.load_format != "dummy":
        # only headers are read
        with open_checkpoint(model_config, config.model_path) as checkpoint:
            if wants_mtp:
                model_config = add_mtp_layer(checkpoint, model_config)
            validate(checkpoint, model_config)
            fp8 = fp8_tensors(checkpoint, model_config)
    else:
        if wants_mtp:
            model_config = add_mtp_layer(None, model_config)
        fp8 = quantisable_tensors(model_config)
    # FP8 GEMMs give bfloat16
    if config.dtype != "bfloat16":
        fp8 = frozenset()
    elif fp8 and not has_fp8:
        logger.warning("%s has no FP8 instructions: FP8 weights are held in bfloat16", device)
        fp8 = frozenset()
    whole_config = model_config
    if size > 1:
        check_blocks(whole_config, size, fp8)
        model_config = whole_config.split(size)
    caches = family(config, model_config, input_batch)
    memory = _plan_memory(config, model_config, caches, max_model_len, fp8, group)
    return EnginePlan(
        config=config,
        model_config=model_config,
        whole_config=whole_config,
        device=device,
        num_threads=threads,
        max_model_len=max_model_len,
        caches=caches,
        tokenizer=tokenizer,
        input_batch=input_batch,
        sampling_defaults=defaults,
        memory=memory,
        fp8=fp8,
    )


def _check_capability(config: EngineConfig) -> bool:
    """Refuse a GPU, or caches, without the instructions; whether a GPU has those of FP8."""
    from fd_dsa.device.resolve import traits_of
    from fd_dsa.triton_runtime.driver import FP8_CAPABILITY, LEAST_CAPABILITY

    device, capability = config.device, traits_of(config.device).capability
    if capability < LEAST_CAPABILITY:
        raise BackendUnavailable(
            f"--device: got {device}, a GPU of compute capability {capability / 10}; kernels need "
            f"{LEAST_CAPABILITY / 10} (A100) or later; take --device cpu"
        )
    has_fp8 = capability >= FP8_CAPABILITY
    if config.kv_cache_dtype == "fp8_ds_mla" and not has_fp8:
        raise ConfigError(
            f"--kv-cache-dtype: got 'fp8_ds_mla', but {device} is of compute capability "
            f"{capability / 10} and FP8 needs {FP8_CAPABILITY / 10} or later; "
            f"take --kv-cache-dtype {config.dtype}"
        )
    return has_fp8


def _with_index_topk(model_config: Any, index_topk: int | None) -> Any:
    """The model's configuration with another number of chosen keys, where one is asked for."""
    if index_topk is None:
        return model_config
    most = model_config.max_position_embeddings
    if index_topk > most:
        raise ConfigError(
            f"--index-topk: got {index_topk}, allowed: at most {most}, the model's "
            "max_position_embeddings, with which every key is chosen; lower it"
        )
    return replace(model_config, index_topk=index_topk)


def _prepare_paddle() -> None:
    """Make Paddle ready to be imported."""
    if find_spec("paddle") is None:
        raise BackendUnavailable(
            f"paddle is not installed; for a CPU run: {extra_command('cpu')} "
            "(for a GPU install paddlepaddle-gpu from Paddle's own package index)"
        )
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        _check_version(name)
    prepare_cpu_runtime()


def _check_version(name: str) -> None:
    """Refuse a release of Paddle that is too old; builds from source, 0.0.0, pass."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        return
    numbers = tuple(int(word) for word in installed.split(".")[:2] if word.isdigit())
    if numbers != (0, 0) and numbers < _OLDEST_PADDLE:
        oldest = ".".join(map(str, _OLDEST_PADDLE))
        # no public index but Paddle's own has the builds for GPUs
        cure = f"install a newer {name} from Paddle's own package index"
        if name == "paddlepaddle":
            cure = pip_command("--upgrade", f"{name}>={oldest}")
        raise BackendUnavailable(
            f"{name} {installed} is too old, fd_dsa needs {oldest} or newer; {cure}"
        )


def sampling_defaults(config: EngineConfig, model_config: Any) -> dict[str, Any]:
    """Return what generation_config.json proposes for parameters that a request leaves out.

    It is empty with `--generation-config vllm`.

    Raises:
        ConfigError: a proposal that no request could make; names the file.
    """
    if config.generation_config != "auto":
        return {}
    defaults: dict[str, Any] = dict(model_config.generation)
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ConfigError(f"{config.model_path / 'generation_config.json'}: {error}") from error
    if defaults:
        logger.info("sampling defaults of generation_config.json: %s", defaults)
    return defaults


def _check_vocabulary(config: EngineConfig, model: Any, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that makes ids for which there is no embedding."""
    if tokenizer.highest_token_id < model.vocab_size:
        return
    file = config.tokenizer_path / "tokenizer.json"
    cure = "it does not belong to this model"
    if config.tokenizer is not None:
        cure = "leave out --tokenizer, which takes the model's own"
    raise ConfigError(
        f"tokenizer: {file} has token ids up to {tokenizer.highest_token_id}, vocab_size of the "
        f"model's config.json is {model.vocab_size}; {cure}"
    )


def _plan_memory(
    config: EngineConfig,
    model_config: Any,
    caches: Caches,
    max_model_len: int,
    fp8: frozenset[str],
    group: Group | None,
) -> MemoryPlan:
    """How the memory is shared out between weights and caches."""
    from fd_dsa.device.resolve import free_device_bytes, traits_of
    from fd_dsa.models.memory_plan import (
        available_memory_bytes,
        graph_bytes,
        plan_memory,
        weight_bytes,
    )

    device = config.device
    room: dict[str, Any] = {}
    free_bytes = free_device_bytes(device, config.gpu_memory_utilization)
    if free_bytes is not None:
        from fd_dsa.runner.device_draws import draw_bytes

        own = caches.workspace_bytes(traits_of(device))
        own += draw_bytes(config.max_num_seqs, model_config.vocab_size, config.most_drafts)
        room["free_bytes"] = max(free_bytes - own, 0)
        room["graph_bytes"] = graph_bytes(model_config, config.capture_sizes, max_model_len)
        room["takes_all"] = True
    elif config.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        logger.warning(
            "--gpu-memory-utilization has no effect on %s; --kv-cache-memory-bytes sets the "
            "size of the caches",
            device,
        )
    if config.tensor_parallel_size > 1:
        free = room.get("free_bytes", available_memory_bytes() // config.tensor_parallel_size)
        # caches are as large on every rank, so the smallest counts
        everywhere = np.array([free])
        if group is not None:
            everywhere = group.all_gather(everywhere)
        room["free_bytes"] = int(everywhere.min())
    return plan_memory(
        config,
        weight_bytes=weight_bytes(model_config, config.dtype, fp8),
        bytes_per_block=caches.bytes_per_block,
        state_bytes=caches.state_bytes,
        max_model_len=max_model_len,
        **room,
    )
