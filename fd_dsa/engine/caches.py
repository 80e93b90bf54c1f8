"""What each family of models keeps in its caches, and the attention backend that reads them.

The engine knows a model's caches by their sizes alone; a family with other caches adds a class here
and its name to `_FAMILIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fd_dsa.attention import DSAAttentionBackend
from fd_dsa.config import EngineConfig
from fd_dsa.errors import flag_error
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.model_runner import backend_config, cache_layout
from fd_dsa.v4_attention import V4AttentionBackend, V4CacheLayout

if TYPE_CHECKING:
    from fd_dsa.triton_runtime.driver import GpuTraits


class DSACaches:
    """Latents and indexer keys in pages: DeepSeek-V3.2 and GLM-5.

    Attributes:
        bytes_per_block: one block over all layers.
        state_bytes: what is kept beside the blocks.
    """

    state_bytes = 0

    def __init__(self, config: EngineConfig, model_config: Any, batch: InputBatch) -> None:
        layout = cache_layout(model_config, config.kv_cache_dtype, config.block_size)
        self._parts, self._dtype = (model_config, layout, batch), config.dtype
        self.bytes_per_block = layout.bytes_per_block(
            len(model_config.has_indexer), model_config.num_indexer_layers
        )

    @staticmethod
    def check_flags(config: EngineConfig, model_config: Any) -> None:
        """Refuse caches that the model's widths do not fit.

        Raises:
            ConfigError: names the flag.
        """
        cache_layout(model_config, config.kv_cache_dtype, config.block_size)

    def workspace_bytes(self, traits: GpuTraits) -> int:
        """Memory of a device that the attention takes beside its caches."""
        from fd_dsa.attention.device import workspace_bytes

        return workspace_bytes(backend_config(*self._parts, dtype=self._dtype), traits)

    def backend(self, num_blocks: int, device: str) -> DSAAttentionBackend:
        """The attention backend over caches of so many blocks."""
        sizes = backend_config(*self._parts, num_blocks, self._dtype)
        return DSAAttentionBackend(sizes, device)


class V4Caches:
    """Windows and entries in pages, states in rows of the batch: DeepSeek-V4, on a CPU."""

    def __init__(self, config: EngineConfig, model_config: Any, batch: InputBatch) -> None:
        self._layout, self._batch = V4CacheLayout(model_config, config.block_size), batch
        self.bytes_per_block = self._layout.bytes_per_block()
        self.state_bytes = batch.max_num_seqs * self._layout.bytes_per_slot()

    @staticmethod
    def check_flags(config: EngineConfig, model_config: Any) -> None:
        """Refuse devices, caches of other types, drafts, and blocks of another size."""
        served = "with deepseek_v4"
        if config.device != "cpu":
            raise flag_error("device", config.device, f"cpu {served}", "give --device cpu")
        if config.tensor_parallel_size > 1:
            size = config.tensor_parallel_size
            raise flag_error("tensor_parallel_size", size, f"1 {served}", "leave it out")
        if config.kv_cache_dtype != "float32":
            allowed = f"auto or float32 {served}"
            raise flag_error("kv_cache_dtype", config.kv_cache_dtype, allowed, "leave it out")
        if config.speculation is not None:
            given = config.speculation.method
            raise flag_error("speculative_config", given, f"none {served}", "leave it out")
        V4CacheLayout(model_config, config.block_size)

    def workspace_bytes(self, traits: GpuTraits) -> int:
        """None: no device is served."""
        return 0

    def backend(self, num_blocks: int, device: str) -> V4AttentionBackend:
        """The attention backend over caches of so many blocks."""
        return V4AttentionBackend(self._layout, self._batch, num_blocks)


Caches = DSACaches | V4Caches
"""Sizes of a model's caches, and what makes them; each family has all of the same names."""
_FAMILIES: dict[str, type[Caches]] = {"deepseek_v4": V4Caches}


def family_of(model_config: Any) -> type[Caches]:
    """The caches of a model's family."""
    return _FAMILIES.get(model_config.model_type, DSACaches)
