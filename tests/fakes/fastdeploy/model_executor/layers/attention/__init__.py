"""Attention layers and backends (`model_executor/layers/attention/__init__.py`)."""

from .attention import Attention
from .attention_selecter import get_attention_backend
from .base_attention_backend import AttentionBackend, AttentionMetadata
from .dsa_attention_backend import DSAAttentionBackend
from .mla_attention_backend import MLAAttentionBackend

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionMetadata",
    "DSAAttentionBackend",
    "MLAAttentionBackend",
    "get_attention_backend",
]
