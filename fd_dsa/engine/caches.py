"""Caches of each class of model configurations, and their attention backend.

The engine knows only the sizes of a model's caches. The configuration describes their layout
(`cache_layout`); a class of configurations with other caches has a class here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig
from fd_dsa.attention.protocol import AttentionBackend
from fd_dsa.cache_formats import CACHE_FORMATS
from fd_dsa.config import EngineConfig
from fd_dsa.distributed import Group
from fd_dsa.engine.snapshots import Snapshots
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.errors import flag_error
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.registry import FamilyConfig
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.protocol import BlockStore, StateCopy
from fd_dsa.runner.state_copies import HostStateCopy
from fd_dsa.tensor import StepArray
from fd_dsa.v4_attention import V4AttentionBackend
from fd_dsa.v4_attention.device_pools import DeviceLayout

if TYPE_CHECKING:
    from fd_dsa.cache_formats import V4CacheLayout
    from fd_dsa.triton_runtime.driver import GpuTraits
    from fd_dsa.v4_attention.device_backend import V4DeviceBackend


# of each row the newest block of its answer, and as many ends of prompts
_SNAPSHOTS_PER_ROW, _MIN_SNAPSHOTS = 2, 16


def backend_config(
    config: ModelConfig,
    layout: CacheLayout,
    batch: InputBatch,
    num_blocks: int | None = None,
    dtype: str = "float32",
) -> DSABackendConfig:
    """Return the sizes of a DSAAttentionBackend for a model and a runner's batch."""
    return DSABackendConfig(
        num_heads=config.num_attention_heads,
        index_n_heads=config.index_n_heads,
        index_topk=config.index_topk,
        softmax_scale=config.softmax_scale,
        cache_layout=layout,
        max_num_seqs=batch.max_num_seqs,
        max_num_tokens=batch.max_num_tokens,
        max_blocks_per_seq=batch.block_tables.shape[1],
        num_blocks=num_blocks,
        dtype=dtype,
        head_widths=(config.qk_nope_head_dim, config.v_head_dim),
        exchange_ranks=config.ranks if exchanged_min_tokens() else 1,
    )


class DSACaches:
    """Paged latents and indexer keys of DeepSeek-V3.2 and GLM-5.

    Attributes:
        bytes_per_block: bytes of one block over all layers.
        state_bytes: bytes in addition to the blocks.
        snapshot_bytes: of these, bytes of one snapshot of a row; 0 = rows have none.
        shares_blocks: True if a row may continue after any block of another one.
        repeats_chunks: False if tokens of a chunk overwrite states that the chunk reads.
    """

    state_bytes, snapshot_bytes, shares_blocks, repeats_chunks = 0, 0, True, True

    def __init__(self, config: EngineConfig, model_config: ModelConfig, batch: InputBatch) -> None:
        layout = model_config.cache_layout(config.kv_cache_dtype, config.tokens_per_block)
        self._parts, self._dtype = (model_config, layout, batch), config.dtype
        self.bytes_per_block = layout.bytes_per_block(
            len(model_config.has_indexer), model_config.num_indexer_layers
        )

    @staticmethod
    def check_flags(config: EngineConfig, model_config: ModelConfig) -> None:
        """Refuse blocks, widths and host memory that the caches cannot have.

        Raises:
            ConfigError: names the flag.
        """
        block_size = CACHE_FORMATS[config.kv_cache_dtype].required.get("block_size")
        if block_size and config.tokens_per_block != block_size:
            allowed = f"{block_size} with --kv-cache-dtype {config.kv_cache_dtype}"
            raise flag_error("block_size", config.tokens_per_block, allowed, "leave it out")
        model_config.cache_layout(config.kv_cache_dtype, config.tokens_per_block)
        _check_offload(config)

    @staticmethod
    def by_block(caches: Sequence[Any], num_blocks: int) -> list[StepArray]:
        """Return the caches of all layers, [num_blocks, ...] each."""
        return [cache for cache in caches if cache is not None]

    def slots(self, backend: AttentionBackend) -> Sequence[StepArray]:
        """Return nothing, because rows have no state in addition to their blocks."""
        return []

    def state_copies(self, backend: AttentionBackend, store: BlockStore | None = None) -> None:
        """Return None, because rows have no state in addition to their blocks."""

    def snapshots(self, copy: StateCopy, num_in_host: int) -> None:
        """Return None, because rows have no state in addition to their blocks."""

    def workspace_bytes(self, traits: GpuTraits) -> int:
        """Return the device memory of the attention without its caches, bytes."""
        from fd_dsa.attention.device_memory import workspace_bytes

        return workspace_bytes(backend_config(*self._parts, dtype=self._dtype), traits)

    def backend(
        self, num_blocks: int, device: str, group: Group | None = None
    ) -> DSAAttentionBackend:
        """Return the attention backend over caches of `num_blocks` blocks.

        Args:
            group: ranks that share the model; None = one rank.
        """
        sizes = backend_config(*self._parts, num_blocks, self._dtype)
        return DSAAttentionBackend(sizes, device, group=group)


class V4Caches:
    """Pools of DeepSeek-V4."""

    repeats_chunks = False

    def __init__(
        self, config: EngineConfig, model_config: DeepseekV4Config, batch: InputBatch
    ) -> None:
        self._config, self._batch, self._dtype = model_config, batch, config.dtype
        self._kv_cache_dtype, self._max_drafts = config.kv_cache_dtype, config.max_drafts
        # on a device rows have rings, which no block holds
        self.shares_blocks, self._num_snapshots = config.device == "cpu", 0
        layout: V4CacheLayout | DeviceLayout
        self._on_device: DeviceLayout | None = None
        sizes = config.kv_cache_dtype, config.tokens_per_block, config.max_drafts
        if config.device == "cpu":
            layout, self.snapshot_bytes = model_config.cache_layout(*sizes), 0
        else:
            layout = self._on_device = DeviceLayout(model_config, *sizes)
            self.snapshot_bytes = layout.bytes_per_snapshot()
            if config.enable_prefix_caching:
                self._num_snapshots = max(_MIN_SNAPSHOTS, _SNAPSHOTS_PER_ROW * batch.max_num_seqs)
        self.bytes_per_block = layout.bytes_per_block()
        self.state_bytes = batch.max_num_seqs * layout.bytes_per_row()
        self.state_bytes += self._num_snapshots * self.snapshot_bytes

    @staticmethod
    def check_flags(config: EngineConfig, model_config: DeepseekV4Config) -> None:
        """Refuse cache formats and block sizes.

        Raises:
            ConfigError: names the flag.
        """
        with_v4 = f"with {model_config.model_type}"
        _check_offload(config)
        cache_dtype = config.kv_cache_dtype
        if config.device != "cpu":
            with_v4 += f" on {config.device}"
            if cache_dtype not in (config.dtype, "fp8_ds_mla"):
                allowed = f"auto, {config.dtype} or fp8_ds_mla {with_v4}"
                raise flag_error("kv_cache_dtype", cache_dtype, allowed, "leave it out")
            width, rope = model_config.head_dim, model_config.qk_rope_head_dim
            if cache_dtype == "fp8_ds_mla" and (width & (width - 1) or width % (2 * rope)):
                allowed = f"auto or {config.dtype} with head_dim {width}, which is no power of two"
                allowed += f" or no multiple of {2 * rope}, twice the rotated channels"
                raise flag_error("kv_cache_dtype", cache_dtype, allowed, "leave it out")
            # the blocks have the same rules as on a CPU
            cache_dtype = "float32"
        model_config.cache_layout(cache_dtype, config.tokens_per_block)

    def by_block(self, caches: Sequence[Any], num_blocks: int) -> list[StepArray]:
        """Return the pools in blocks of all layers, [num_blocks, ...] each."""
        sizes = () if self._on_device is not None else (num_blocks, self._batch.block_size)
        return [pool for pools in caches for pool in pools.by_block(*sizes)]

    def slots(self, backend: AttentionBackend) -> Sequence[StepArray]:
        """Return the states of rows and then of snapshots, [num_slots, values] for each layer.

        Args:
            backend: backend of this rank, with its pools.
        """
        return _device_backend(backend).slots

    def state_copies(
        self, backend: AttentionBackend, store: BlockStore | None = None
    ) -> StateCopy | None:
        """Return the function that copies states of rows, None without prefix caching or on a CPU.

        The call compiles its kernel.

        Args:
            backend: backend of this rank, with its pools.
            store: host memory for snapshots, or None.
        """
        if not self._num_snapshots:
            return None
        from fd_dsa.triton_runtime import warming

        copy, first_snapshot = _device_backend(backend).copy_slot, self._batch.max_num_seqs
        with warming():
            copy(first_snapshot, first_snapshot)
        if store is None:
            return copy
        return HostStateCopy(copy, store, first_snapshot + self._num_snapshots)

    def snapshots(self, copy: StateCopy, num_in_host: int) -> Snapshots | None:
        """Return the snapshots of rows, None without prefix caching or on a CPU.

        Args:
            copy: copies a state on all ranks.
            num_in_host: number of snapshots that host memory holds in addition.
        """
        if not self._num_snapshots:
            return None
        first = self._batch.max_num_seqs
        end = first + self._num_snapshots
        sizes = copy, self._batch.block_size
        return Snapshots(range(first, end), *sizes, range(end, end + num_in_host))

    def workspace_bytes(self, traits: GpuTraits) -> int:
        """Return the device memory of the attention without its caches, bytes."""
        from fd_dsa.v4_attention.device_memory import workspace_bytes

        assert self._on_device is not None, "a CPU has no workspace"
        return workspace_bytes(self._on_device, self._batch, self._dtype, traits)

    def backend(
        self, num_blocks: int, device: str, group: Group | None = None
    ) -> V4AttentionBackend | V4DeviceBackend:
        """Return the attention backend over caches of `num_blocks` blocks.

        Args:
            group: ranks that share the model; None = one rank. On a CPU every rank selects for all
                tokens.
        """
        if device == "cpu":
            return V4AttentionBackend(self._config, self._batch, num_blocks, self._max_drafts)
        # kernels are loaded only for a device
        from fd_dsa.v4_attention.device_backend import V4DeviceBackend

        sizes = self._config, self._batch, num_blocks, device, self._dtype
        return V4DeviceBackend(
            *sizes,
            num_snapshots=self._num_snapshots,
            max_drafts=self._max_drafts,
            kv_cache_dtype=self._kv_cache_dtype,
            group=group,
        )


def _device_backend(backend: AttentionBackend) -> V4DeviceBackend:
    from fd_dsa.v4_attention.device_backend import V4DeviceBackend

    assert isinstance(backend, V4DeviceBackend), "the backend of `backend`"
    return backend


def _check_offload(config: EngineConfig) -> None:
    """Refuse host memory for prefix blocks without prefix blocks."""
    if config.kv_offload_bytes and not config.enable_prefix_caching:
        allowed = "0 without prefix caching"
        raise flag_error("kv_offload_bytes", config.kv_offload_bytes, allowed, "leave it out")


Caches = DSACaches | V4Caches
"""Sizes of a model's caches, and the constructor of their backend."""
_CLASSES: dict[type[FamilyConfig], type[Any]] = {ModelConfig: DSACaches, DeepseekV4Config: V4Caches}


def caches_class(model_config: FamilyConfig) -> type[Any]:
    """Return the class of a model's caches, one of `Caches`."""
    return _CLASSES[type(model_config)]
