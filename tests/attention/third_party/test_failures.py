"""FlashMLA and DeepGEMM missing, broken or wrong: our kernels serve, and it is said once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the doubles compute on Paddle's tensors")

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.ops._third_party import third_party_table
from tests.attention.third_party.kernel_case import BOTH, Install, KernelCase, serving
from tests.kernel_memory import KernelMemory

pytestmark = pytest.mark.triton

DECODE = [(0, 140, 1), (0, 0, 0), (0, 70, 2)]
PACKAGES = {package: operator for operator, package in BOTH.items()}
BFLOAT16_CACHE = CacheLayout("bfloat16", 64, 512, 64, 128)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """What was logged about packages at a level, in order."""
    caplog.set_level(logging.INFO, logger="fd_dsa.ops._third_party")

    def of(level: str) -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelname == level]

    return of


def reason_for(package: str) -> str:
    """Why a package serves or not."""
    (found,) = (x for x in third_party_table() if x.package == package)
    return found.reason


def test_nothing_is_installed(memory: KernelMemory, lines: Any) -> None:
    for _ in range(2):
        KernelCase(memory, DECODE).begin().begin()
    assert serving() == {}
    assert lines("INFO") == [
        f"{operator} on cpu: {package} is left out, our kernel serves (not installed)"
        for operator, package in BOTH.items()
    ]
    assert lines("WARNING") == []


@pytest.mark.parametrize(
    ("config", "package", "reason"),
    [
        ({"num_heads": 144}, "flash_mla", "144 heads, it takes up to 128"),
        ({"dtype": "float32"}, "flash_mla", "activations are float32, it takes bfloat16"),
        ({"index_topk": 72}, "flash_mla", "index_topk 72, it takes multiples of 64"),
        (
            {"cache_layout": BFLOAT16_CACHE},
            "flash_mla",
            "the cache is bfloat16, it reads fp8_ds_mla",
        ),
        ({"index_n_heads": 16}, "deep_gemm", "16 index heads, it takes 32 or 64"),
        (
            {"cache_layout": BFLOAT16_CACHE},
            "deep_gemm",
            "the cache is bfloat16, it reads fp8_ds_mla",
        ),
    ],
)
def test_shapes_that_a_package_does_not_take(
    memory: KernelMemory, doubles: Install, lines: Any, config: Any, package: str, reason: str
) -> None:
    doubles()
    for _ in range(2):
        KernelCase(memory, DECODE, config=config).begin()
    assert reason_for(package) == reason
    assert PACKAGES[package] not in serving()
    assert package not in sys.modules
    assert lines("WARNING") == []
    assert sum(package in line for line in lines("INFO")) == 1


def test_block_tables_of_all_tokens_have_a_limit(
    memory: KernelMemory, doubles: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_dsa.ops.indexer_logits.deep_gemm._TABLE_BYTES", 59)
    doubles()
    # 5 tokens with 3 pages each
    case = KernelCase(memory, DECODE)
    assert case.config.max_num_tokens * case.config.max_blocks_per_seq == 15
    assert reason_for("deep_gemm") == "a block table for every token takes 60 bytes, limit 59"


BROKEN = {
    "raises": ("raise OSError('libcuda.so.1: cannot open')\n", "OSError: libcuda.so.1"),
    "is empty": ("", "AttributeError: module "),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_cannot_be_used(
    memory: KernelMemory,
    doubles: Install,
    lines: Any,
    tmp_path: Path,
    package: str,
    source: str,
    reason: str,
) -> None:
    doubles()
    (tmp_path / f"{package}.py").write_text(source)
    # undone before the doubles go: else the path that is put back would still hold theirs
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        for _ in range(2):
            KernelCase(memory, DECODE).begin().begin()
    sys.modules.pop(package, None)
    assert serving() == {o: p for o, p in BOTH.items() if p != package}
    (warning,) = lines("WARNING")
    assert warning.startswith(f"{PACKAGES[package]} on cpu: {package} failed")
    assert reason in warning


def scaled(function: Any, factor: float) -> Any:
    """A function whose result, or the first of its results, is wrong by a factor."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return wrong


@pytest.mark.parametrize("factor", [1.05, float("nan")])
@pytest.mark.parametrize(
    ("package", "name"),
    [("flash_mla", "flash_mla_with_kvcache"), ("deep_gemm", "fp8_paged_mqa_logits")],
)
def test_wrong_results_in_the_probe(
    memory: KernelMemory, doubles: Install, lines: Any, package: str, name: str, factor: float
) -> None:
    doubles()
    module = __import__(package)
    setattr(module, name, scaled(getattr(module, name), factor))
    for _ in range(2):
        KernelCase(memory, DECODE).begin().begin()
    assert serving() == {o: p for o, p in BOTH.items() if p != package}
    (warning,) = lines("WARNING")
    assert f"{package} failed" in warning and "results differ by" in warning


def test_a_row_without_keys_must_give_zeros(
    memory: KernelMemory, doubles: Install, lines: Any
) -> None:
    doubles()
    import flash_mla

    whole = flash_mla.flash_mla_with_kvcache

    def averaging(*args: Any, **kwargs: Any) -> Any:
        out, lse = whole(*args, **kwargs)
        out[1] = 1.0
        return out, lse

    flash_mla.flash_mla_with_kvcache = averaging
    KernelCase(memory, DECODE).begin()
    assert "flash_mla" not in serving().values()
    assert "a row without keys" in lines("WARNING")[0]


def test_wrong_gathered_scores_are_not_used(memory: KernelMemory, doubles: Install) -> None:
    doubles()
    import deep_gemm

    deep_gemm.fp8_mqa_logits = scaled(deep_gemm.fp8_mqa_logits, 1.05)
    rows = [(4, 66, 4), (0, 70, 2)]
    case = KernelCase(memory, rows).begin()
    assert serving() == BOTH
    assert not case.attention._third_party.scores._gemm.reads_gathered
    wanted = memory.get(KernelCase(memory, rows).ours().select())
    np.testing.assert_array_equal(memory.get(case.select()), wanted)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_failure_after_the_probe(
    memory: KernelMemory, doubles: Install, lines: Any, package: str
) -> None:
    wanted = KernelCase(memory, DECODE).ours()
    doubles()
    case = KernelCase(memory, DECODE, layers=2).begin()
    kernels, calls = case.attention._third_party, []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise RuntimeError("CUDA driver version is insufficient\nand more")

    if package == "deep_gemm":
        kernels.scores._gemm.score_pages = failing
        results = [memory.get(case.select()) for _ in range(2)]
        np.testing.assert_array_equal(results[0], memory.get(wanted.select()))
    else:
        kernels.attention.attend = failing
        selection = wanted.select()
        results = [case.attend(selection) for _ in range(2)]
        np.testing.assert_array_equal(results[0], wanted.attend(selection))
    np.testing.assert_array_equal(results[0], results[1])
    case.begin()
    assert calls == [1]
    assert serving() == {o: p for o, p in BOTH.items() if p != package}
    (warning,) = lines("WARNING")
    assert warning.endswith("(RuntimeError: CUDA driver version is insufficient)")


def test_a_failure_of_the_schedule(memory: KernelMemory, doubles: Install, lines: Any) -> None:
    doubles()
    case = KernelCase(memory, DECODE).begin()
    kernels = case.attention._third_party

    def failing(lengths: Any) -> None:
        raise RuntimeError("no nvcc")

    kernels.scores._gemm.schedule = failing
    case.begin()
    wanted = memory.get(KernelCase(memory, DECODE).ours().select())
    np.testing.assert_array_equal(memory.get(case.select()), wanted)
    assert len(lines("WARNING")) == 1
