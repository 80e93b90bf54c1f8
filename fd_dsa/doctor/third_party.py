"""Whether packages of other projects would serve the steps of DeepSeek-V3.2 on a device."""

from __future__ import annotations

from typing import Any

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops._third_party import is_installed, third_party_table

_PACKAGES = {"deep_gemm": "indexer_logits", "flash_mla": "sparse_mla"}
_HEADS, _INDEX_HEADS, _INDEX_DIM, _TOKENS, _BLOCKS = 16, 64, 128, 32, 4


def facts(device: str) -> list[dict[str, Any]]:
    """`package`, `operator`, `serves` and `reason` of each, after a probe on a device.

    The probe is that of the first step of an engine, with the heads that DeepSeek-V3.2 has on each
    of eight GPUs: another model may have numbers of heads that a package does not take.
    """
    if device == "cpu":
        return [
            {"package": package, "operator": operator, "serves": False, "reason": _on_cpu(package)}
            for package, operator in _PACKAGES.items()
        ]
    _try_on(device)
    return [
        {"package": x.package, "operator": x.operator, "serves": x.serves, "reason": x.reason}
        for x in third_party_table()
    ]


def as_lines(found: list[dict[str, Any]]) -> list[str]:
    """The report for a person."""
    lines = ["  package          for               serves   why"]
    for entry in found:
        serves = "yes" if entry["serves"] else "no"
        lines.append(
            f"  {entry['package']:<16} {entry['operator']:<17} {serves:<8} {entry['reason']}"
        )
    return lines


def _on_cpu(package: str) -> str:
    """Why a package does not serve a CPU."""
    return "not tried: it needs a GPU" if is_installed(package) else "not installed"


def _try_on(device: str) -> None:
    """Let the packages that are installed prove themselves."""
    # kernels are loaded only where there is a device
    from fd_dsa.attention.device import empty_allocator
    from fd_dsa.attention.third_party import ThirdPartyKernels

    allocate = empty_allocator(device)
    queries = allocate((_TOKENS, _INDEX_HEADS, _INDEX_DIM), "uint8")
    weights = allocate((_TOKENS, _INDEX_HEADS), "float32")
    ThirdPartyKernels(one_of_eight(), allocate, queries, weights, 1 << 20).try_packages()


def one_of_eight() -> DSABackendConfig:
    """DeepSeek-V3.2 as each of eight GPUs has it."""
    return DSABackendConfig(
        num_heads=_HEADS,
        index_n_heads=_INDEX_HEADS,
        index_topk=2048,
        softmax_scale=0.1352,
        cache_layout=CacheLayout("fp8_ds_mla", 64, 512, 64, _INDEX_DIM),
        max_num_seqs=1,
        max_num_tokens=_TOKENS,
        max_blocks_per_seq=_BLOCKS,
        dtype="bfloat16",
    )
