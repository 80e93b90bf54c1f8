"""Parameters of a request (`vllm/sampling_params.py`)."""

from dataclasses import dataclass
from enum import Enum


class RequestOutputKind(Enum):
    """Content of an output of a request."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """The fields that the benchmark sets, in vLLM's order."""

    temperature: float = 1.0
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
