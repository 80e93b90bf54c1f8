"""A captured step is its graph: the host launches and allocates nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.null_driver.marks import NULL_DRIVER
from tests.triton_runtime.fakes import run_module

pytestmark = [pytest.mark.slow, *NULL_DRIVER]


@pytest.mark.parametrize(
    ("arguments", "dense_keys"),
    [((), 2048), (("deepseek_v4",), 2051), (("deepseek_v4", "4"), 2051)],
    ids=["v32", "v4", "v4, 4 ranks"],
)
def test_a_captured_step_launches_and_allocates_nothing(
    tmp_path: Path, arguments: tuple[str, ...], dense_keys: int
) -> None:
    pytest.importorskip("paddle")
    printed = run_module(tmp_path, "tests.null_driver.captured_steps", *arguments)
    # every graph was replayed
    assert printed.splitlines() == [
        f"{size} tokens, rows up to {length}: 0 launches, 0 allocations"
        for size in (8, 64, 256)
        for length in (dense_keys, 8192)
    ]
