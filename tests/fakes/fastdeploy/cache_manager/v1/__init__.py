"""The cache manager of ENABLE_V1_KVCACHE_MANAGER (`cache_manager/v1/`)."""

from .cache_controller import CacheController

__all__ = ["CacheController"]
