"""Which of our kernels on tensor cores would serve the steps of DeepSeek-V3.2 on a device."""

from __future__ import annotations

from typing import Any

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.config import DSABackendConfig

_OPERATORS = ("indexer_logits", "sparse_mla")


def facts(device: str) -> list[dict[str, Any]]:
    """`operator`, `serves` and `reason` of each, with the heads of one of eight GPUs.

    Where one does not serve, the kernel for every type and GPU does.
    """
    if device == "cpu":
        return [
            {"operator": operator, "serves": False, "reason": "it needs a GPU"}
            for operator in _OPERATORS
        ]
    # kernels are loaded only where there is a device
    from fd_dsa.attention.device import empty_allocator
    from fd_dsa.attention.device_kernels import reasons_against
    from fd_dsa.ops._provider import TENSOR_CORE, provider_reason
    from fd_dsa.triton_runtime.transfers import transfers_for

    tensor = empty_allocator(device)((1,), "int32")
    against = reasons_against(one_of_eight(), transfers_for(tensor).capability())
    return [
        {
            "operator": operator,
            "serves": reason is None,
            "reason": reason or provider_reason(TENSOR_CORE),
        }
        for operator, reason in against.items()
    ]


def as_lines(found: list[dict[str, Any]]) -> list[str]:
    """The report for a person."""
    lines = ["  on tensor cores    serves   why"]
    for entry in found:
        serves = "yes" if entry["serves"] else "no"
        lines.append(f"  {entry['operator']:<18} {serves:<8} {entry['reason']}")
    return lines


def one_of_eight() -> DSABackendConfig:
    """DeepSeek-V3.2 as each of eight GPUs has it."""
    return DSABackendConfig(
        num_heads=16,
        index_n_heads=64,
        index_topk=2048,
        softmax_scale=0.1352,
        cache_layout=CacheLayout("fp8_ds_mla", 64, 512, 64, 128),
        max_num_seqs=1,
        max_num_tokens=32,
        max_blocks_per_seq=4,
        dtype="bfloat16",
    )
