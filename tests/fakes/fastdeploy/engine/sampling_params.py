"""SamplingParams, the part of it that greedy requests set (`engine/sampling_params.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SamplingParams:
    """How a request's tokens are chosen."""

    temperature: float = 1.0
    max_tokens: int | None = None
