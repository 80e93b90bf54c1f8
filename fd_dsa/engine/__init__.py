"""Embedded engine: requests in, tokens and text out, on one device in one process."""

from __future__ import annotations

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer

__all__ = [
    "AsyncEngine",
    "EngineStats",
    "LLMEngine",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "Tokenizer",
]
