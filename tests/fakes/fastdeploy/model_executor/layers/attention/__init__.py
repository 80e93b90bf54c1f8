"""Attention layers and backends (`model_executor/layers/attention/__init__.py`)."""

from fastdeploy import _tree

from .append_attn_backend import AppendAttentionBackend
from .attention import Attention
from .attention_selecter import get_attention_backend
from .base_attention_backend import AttentionBackend, AttentionMetadata
from .mla_attention_backend import MLAAttentionBackend

__all__ = [
    "AppendAttentionBackend",
    "Attention",
    "AttentionBackend",
    "AttentionMetadata",
    "MLAAttentionBackend",
    "get_attention_backend",
]

if _tree.current().defect != "raising_import":
    from .dsa_attention_backend import DSAAttentionBackend

    __all__ += ["DSAAttentionBackend"]
