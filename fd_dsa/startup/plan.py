"""Plan of an engine, made before memory is taken: device, folder, limits, sizes.

All checks of flags, files and memory are here.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.config import EngineConfig
from fd_dsa.distributed import Group
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.errors import ConfigError
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.startup.graph_sizes import step_bytes
from fd_dsa.startup.hardware import choose_device, has_fp8, prepare_paddle, warming_on
from fd_dsa.startup.host_memory import available_memory_bytes
from fd_dsa.startup.memory import (
    MemoryPlan,
    plan_memory,
    weight_bytes,
    whole_heads_bytes,
)

if TYPE_CHECKING:
    from fd_dsa.engine.caches import Caches
    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.four_bits import FourBits
    from fd_dsa.models.registry import FamilyConfig
    from fd_dsa.triton_runtime.driver import GpuTraits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """Decisions of a start, made before weights are loaded.

    Attributes:
        config: flags, with device, types and drafts resolved for this machine.
        model_config: configuration of this rank's part of the model, of its family's class.
        whole_config: configuration of the whole model, the same object with one rank.
        num_threads: threads of Paddle's CPU kernels.
        caches: sizes of the caches, which make the attention backend.
        tokenizer: tokenizer of the folder.
        input_batch: rows of a step, empty.
        sampling_defaults: fields of SamplingParams that the folder proposes.
        memory: sizes of weights and caches.
        fp8: names of the tensors that a device holds as FP8.
        four_bits: experts that a device holds in four bits; None = there are none.
    """

    config: EngineConfig
    model_config: FamilyConfig
    whole_config: FamilyConfig
    num_threads: int
    caches: Caches
    tokenizer: Tokenizer
    input_batch: InputBatch
    sampling_defaults: dict[str, Any]
    memory: MemoryPlan
    fp8: frozenset[str]
    four_bits: FourBits | None = None

    @property
    def device(self) -> str:
        """Device of this rank: "cpu", "gpu:0" or a custom device of Paddle."""
        return self.config.device

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, tokens."""
        return self.memory.max_model_len

    def summary(self) -> str:
        """Return model, device and limits in one line."""
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
        """Return all values of the plan, for people and programs."""
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
            "block_size": config.tokens_per_block,
            "enable_prefix_caching": config.enable_prefix_caching,
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.num_seqs,
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
                "activation_bytes": self.memory.activation_bytes,
                "state_bytes": self.memory.state_bytes,
                "num_blocks": self.memory.num_blocks,
                "num_tokens": self.memory.num_blocks * self.memory.block_size,
                "num_host_blocks": self.memory.num_host_blocks,
                "num_host_snapshots": self.memory.num_host_snapshots,
                "free_bytes": self.memory.free_bytes,
            },
        }


def make_plan(config: EngineConfig, group: Group | None = None) -> EnginePlan:
    """Plan the engine of `config`, and check that it can be served.

    The files of the folder are read and compared, then memory is planned, but not taken. Call this
    before anything imports Paddle, which reads its settings from the environment.

    Args:
        group: ranks that share the model, each of which makes its plan now; None = only rank 0
            plans, without the others.

    Raises:
        ConfigError: a flag, the folder, its checkpoint or the memory is wrong. The message has the
            cure.
        BackendUnavailable: Paddle is missing or too old, or has no such device.
    """
    prepare_paddle()
    # this imports Paddle
    from fd_dsa.engine.caches import caches_class

    config, num_threads = choose_device(config, 0 if group is None else group.rank)
    model_config = _read_model(config, warns=group is None or group.rank == 0)
    config = config.with_blocks(model_config.default_block_size)
    caches_class(model_config).check_flags(config, model_config)
    defaults = sampling_defaults(config, model_config)
    max_model_len = config.resolve_max_model_len(model_config.max_position_embeddings)
    tokenizer = Tokenizer.from_folder(config.tokenizer_path, config.chat_template)
    _check_vocabulary(config, model_config, tokenizer)
    input_batch = new_batch(config, max_model_len)
    whole_config, fp8, four_bits = _check_weights(config, model_config)
    size = config.tensor_parallel_size
    model_config = whole_config if size == 1 else whole_config.split(size)
    caches = caches_class(model_config)(config, model_config, input_batch)
    num_bytes = weight_bytes(model_config, config.dtype, fp8, four_bits)
    if config.device != "cpu" and exchanged_min_tokens():
        num_bytes += whole_heads_bytes(model_config, config.dtype, size)
    memory = _plan_memory(config, model_config, caches, max_model_len, num_bytes, group)
    return EnginePlan(
        config=config,
        model_config=model_config,
        whole_config=whole_config,
        num_threads=num_threads,
        caches=caches,
        tokenizer=tokenizer,
        input_batch=input_batch,
        sampling_defaults=defaults,
        memory=memory,
        fp8=fp8,
        four_bits=four_bits,
    )


def new_batch(config: EngineConfig, max_model_len: int) -> InputBatch:
    """Return an empty batch, whose rows hold up to `max_model_len` tokens."""
    columns = -(-max_model_len // config.tokens_per_block)
    sizes = config.num_seqs, config.num_batched_tokens, columns, config.tokens_per_block
    return InputBatch(*sizes)


def _read_model(config: EngineConfig, warns: bool) -> FamilyConfig:
    """Read the configuration of the model, with the flags that change it.

    Args:
        warns: True = log the unknown fields that are ignored.
    """
    from fd_dsa.models.registry import read_config

    model_config = read_config(config.model_path, allow_unknown=config.allow_unknown_config_fields)
    if model_config.unknown_fields and warns:
        names = ", ".join(model_config.unknown_fields)
        logger.warning("%s: unknown fields of config.json, ignored: %s", config.model, names)
    return _with_index_topk(model_config, config.index_topk)


def _check_weights(
    config: EngineConfig, model_config: FamilyConfig
) -> tuple[FamilyConfig, frozenset[str], FourBits | None]:
    """Compare the checkpoint's tensors with the model.

    Only the headers of the tensors are read.

    Returns:
        The configuration, with its MTP layer if drafts need it. The names of the tensors that the
        device holds as FP8. The experts that it holds in four bits.
    """
    from fd_dsa.models.four_bit_experts import four_bit_experts
    from fd_dsa.models.loader import fp8_tensors, validate, with_whole_blocks
    from fd_dsa.models.mtp_layer import add_mtp_layer
    from fd_dsa.models.registry import open_checkpoint

    wants_mtp = config.speculation is not None and config.speculation.method == "mtp"
    # kernels read rows in bfloat16
    may_have_four_bits = config.device != "cpu" and config.dtype == "bfloat16"
    size, four_bits = config.tensor_parallel_size, None
    opened: AbstractContextManager[Checkpoint | None] = nullcontext()
    if config.load_format != "dummy":
        opened = open_checkpoint(model_config, config.model_path)
    with opened as checkpoint:
        if wants_mtp:
            model_config = add_mtp_layer(checkpoint, model_config)
        if checkpoint is not None:
            validate(checkpoint, model_config)
        fp8 = fp8_tensors(checkpoint, model_config)
        if may_have_four_bits:
            four_bits = four_bit_experts(checkpoint, model_config, size)
    if four_bits is not None and (reason := _four_bit_difference(four_bits, config.device)):
        logger.warning("%s: experts in four bits are dequantised: %s", config.device, reason)
        four_bits = None
    # FP8 GEMMs give bfloat16
    if config.dtype != "bfloat16":
        fp8 = frozenset()
    elif fp8 and not has_fp8(config.device):
        warning = "%s has no FP8 instructions: FP8 weights are held in bfloat16"
        logger.warning(warning, config.device)
        fp8 = frozenset()
    if size > 1:
        fp8 = with_whole_blocks(model_config, size, fp8)
    return model_config, fp8, four_bits


def _four_bit_difference(four_bits: FourBits, device: str) -> str:
    """Return why a device cannot hold experts in four bits, or ""."""
    from fd_dsa.device.allocation import paddle_allocator
    from fd_dsa.models import four_bit_check

    with warming_on(device):
        return four_bit_check.difference(four_bits, paddle_allocator(device))


def _with_index_topk(model_config: FamilyConfig, index_topk: int | None) -> FamilyConfig:
    """Replace the number of keys that the indexer selects, unless `index_topk` is None."""
    if index_topk is None:
        return model_config
    most = model_config.max_position_embeddings
    if index_topk > most:
        raise ConfigError(
            f"--index-topk: got {index_topk}, allowed: at most {most}, the model's "
            "max_position_embeddings, with which every key is selected; lower it"
        )
    return replace(model_config, index_topk=index_topk)


def sampling_defaults(config: EngineConfig, model_config: FamilyConfig) -> dict[str, Any]:
    """Return values of generation_config.json for parameters that a request leaves out.

    It is empty with `--generation-config vllm`.

    Raises:
        ConfigError: a value that a request could not have either. The message names the file.
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


def _check_vocabulary(config: EngineConfig, model: FamilyConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that have no embedding."""
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
    model_config: FamilyConfig,
    caches: Caches,
    max_model_len: int,
    num_bytes: int,
    group: Group | None,
) -> MemoryPlan:
    """Plan the memory of weights and caches, by the rank with the least memory.

    Args:
        num_bytes: bytes of this rank's weights.
    """
    from fd_dsa.device.resolve import free_device_bytes, traits_of

    device, num_ranks = config.device, config.tensor_parallel_size
    free_bytes = free_device_bytes(device, config.gpu_memory_utilization)
    sizes = cache_sizes(caches, max_model_len)
    has_own_memory = free_bytes is not None
    if free_bytes is not None:
        work_bytes = workspace_bytes(config, model_config, caches, traits_of(device))
        free_bytes = max(free_bytes - work_bytes, 0)
        sizes |= step_bytes(config, model_config, max_model_len)
    elif config.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        logger.warning(
            "--gpu-memory-utilization has no effect on %s; --kv-cache-memory-bytes sets the "
            "size of the caches",
            device,
        )
    if num_ranks > 1:
        if free_bytes is None:
            free_bytes = available_memory_bytes() // num_ranks
        # caches have the same size on every rank, so the smallest memory and the largest weights
        # count; weights differ if one device lacks the kernels of a format
        ranks = np.array([[free_bytes, num_bytes]])
        if group is not None:
            ranks = group.all_gather(ranks[0])
        free_bytes, num_bytes = int(ranks[:, 0].min()), int(ranks[:, 1].max())
    return plan_memory(
        config,
        weight_bytes=num_bytes,
        free_bytes=free_bytes,
        takes_all=has_own_memory,
        **sizes,
    )


def cache_sizes(caches: Caches, max_model_len: int) -> dict[str, int]:
    """Return the sizes of the caches, as arguments of `plan_memory`."""
    return {
        "max_model_len": max_model_len,
        "bytes_per_block": caches.bytes_per_block,
        "state_bytes": caches.state_bytes,
        "snapshot_bytes": caches.snapshot_bytes,
    }


def workspace_bytes(
    config: EngineConfig, model_config: FamilyConfig, caches: Caches, traits: GpuTraits
) -> int:
    """Return the bytes that a device needs in addition to weights, caches and steps."""
    from fd_dsa.runner.device_steps import sampling_bytes

    sizes = config.num_seqs, model_config.vocab_size, config.max_drafts
    return caches.workspace_bytes(traits) + sampling_bytes(*sizes)
