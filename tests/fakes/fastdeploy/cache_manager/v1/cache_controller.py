"""Caches made by the backends themselves (`cache_manager/v1/cache_controller.py` at 39d329f2)."""

from __future__ import annotations

from typing import Any

from fastdeploy import _memory

_ROLES = ("key", "value", "key_scale", "value_scale", "indexer")


class CacheController:
    """Owns the caches of a rank."""

    def __init__(self, fd_config: Any, local_rank: int, device_id: int) -> None:
        self.fd_config, self.local_rank, self.device_id = fd_config, local_rank, device_id
        self._caches: list[Any] = []

    def initialize_kv_cache(self, attn_backend: list[Any], num_gpu_blocks: int) -> list[Any]:
        """A flat list, layer by layer, all roles of each.

        Raises:
            ValueError: not as many backends as layers.
        """
        num_layers = self.fd_config.model_config.num_hidden_layers
        if len(attn_backend) != num_layers:
            raise ValueError(f"{len(attn_backend)} attention backends for {num_layers} layers")
        self._caches = []
        for layer, backend in enumerate(attn_backend):
            made = backend.create_kv_cache(
                num_layers=1,
                num_blocks=num_gpu_blocks,
                cache_dtype=self.fd_config.cache_config.cache_dtype,
                kv_cache_quant_type=None,
                layer_offset=layer,
            )
            self._caches += [made[role, layer] for role in _ROLES if (role, layer) in made]
        return self._caches

    def free_gpu_cache(self) -> None:
        """Give the caches up; a later reader finds poison."""
        for cache in self._caches:
            _memory.free(cache)
        self._caches = []
