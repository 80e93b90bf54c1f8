"""The start of an engine on a device compiles every kernel that its steps ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.null_driver.marks import NULL_DRIVER
from tests.null_driver.random_steps import STEPS
from tests.triton_runtime.fakes import run_module

pytestmark = [pytest.mark.slow, *NULL_DRIVER]


# one row, whose drafts alone make attention see more than one token that decodes
ONE_ROW_WITH_DRAFTS = 119


@pytest.mark.parametrize(
    "arguments",
    [
        *((str(seed),) for seed in (*range(5), ONE_ROW_WITH_DRAFTS)),
        *((str(seed), "deepseek_v4") for seed in (1, 2, 5, 7, 24)),
        ("1", "nvfp4 of modelopt"),
        ("3", "awq"),
        ("4", "gptq, symmetric"),
    ],
    ids=" ".join,
)
def test_no_kernel_is_compiled_after_the_start(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    pytest.importorskip("paddle")
    printed = run_module(tmp_path, "tests.null_driver.random_steps", *arguments)
    # the processes of the start compile all that the start itself needs
    assert "kernels compiled by processes, others: [], 0 launches meanwhile\n" in printed
    assert printed.endswith(f"{STEPS} steps, 0 late compilations\n"), printed


@pytest.mark.parametrize("seed", ["4", "11"])
def test_no_kernel_of_attention_by_tokens_is_compiled_after_the_start(
    tmp_path: Path, seed: str
) -> None:
    pytest.importorskip("paddle")
    least = {f"FD_DSA_{name}_MIN_TOKENS": "512" for name in ("DIVIDED", "EXCHANGED")}
    printed = run_module(tmp_path, "tests.null_driver.random_steps", seed, **least)
    assert "divided by tokens from 512 on" in printed
    assert printed.endswith(f"{STEPS} steps, 0 late compilations\n"), printed
