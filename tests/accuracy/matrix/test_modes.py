"""The table of modes means what it says."""

from __future__ import annotations

import pytest

from fd_dsa.accuracy.matrix.machine import why_not
from fd_dsa.accuracy.matrix.modes import (
    BASE_ENGINE,
    INVARIANT,
    MODES,
    QUICK_MODES,
    REFERENCE,
    choose,
)
from fd_dsa.config import EngineConfig
from fd_dsa.errors import ConfigError

# what may differ without any change of provider, cache dtype or batch
WAYS = {"max_num_batched_tokens", "enable_prefix_caching", "num_gpu_blocks_override"}
BY_NAME = {mode.name: mode for mode in MODES}


def test_names_are_unique_and_each_mode_follows_the_one_it_is_compared_with() -> None:
    seen: set[str] = set()
    for mode in MODES:
        assert mode.name not in seen
        assert mode.against in seen if seen else mode.name == REFERENCE
        seen.add(mode.name)


def test_only_the_reference_is_compared_with_nothing() -> None:
    assert [mode.name for mode in MODES if mode.kind == "reference"] == [REFERENCE]


def test_exact_modes_differ_in_the_way_alone() -> None:
    exact = [mode for mode in MODES if mode.exact]
    assert {"chunk-64", "one-shot", "prefix-hits", "preemption"} <= {mode.name for mode in exact}
    for mode in exact:
        beside = BY_NAME[str(mode.against)]
        assert dict(mode.environment) == dict(beside.environment)
        changed = {
            name
            for name in BASE_ENGINE
            if {**BASE_ENGINE, **mode.engine}[name] != {**BASE_ENGINE, **beside.engine}[name]
        }
        # in one order of sums the batch makes no difference either
        allowed = WAYS | ({"max_num_seqs"} if INVARIANT in mode.environment else set())
        assert changed and changed <= allowed, mode.name


def test_every_field_is_one_of_the_engine() -> None:
    fields = set(EngineConfig.__dataclass_fields__)
    assert all(set(mode.engine) <= fields for mode in MODES)
    assert set(BASE_ENGINE) <= fields


def test_every_cache_dtype_and_both_batches_are_there() -> None:
    engines = [{**BASE_ENGINE, **mode.engine} for mode in MODES]
    assert {engine["kv_cache_dtype"] for engine in engines} == {"float32", "bfloat16", "fp8_ds_mla"}
    assert {engine["max_num_seqs"] for engine in engines} == {1, 32}


def test_a_chosen_mode_brings_those_it_is_compared_with() -> None:
    assert [mode.name for mode in choose("fp8-all")] == [REFERENCE, "fp8", "fp8-all"]
    assert choose(None) == MODES
    assert choose(QUICK_MODES)[0].name == REFERENCE


@pytest.mark.parametrize("names", ["chunk-65", "fp8,none", ",", ""])
def test_unknown_modes_are_refused(names: str) -> None:
    with pytest.raises(ConfigError, match=r"--modes: got .*allowed: reference, chunk-64"):
        choose(names)


def test_what_a_machine_lacks_is_told() -> None:
    here = {mode.name for mode in MODES if why_not(mode, "cpu") is None}
    assert "invariant-fp8-all" in here and "paddle" not in here and "triton" not in here
    on_device = {mode.name for mode in MODES if why_not(mode, "gpu:0") is None}
    assert "paddle" in on_device and "invariant" not in on_device
    assert "without kernels" in str(why_not(BY_NAME["triton"], "gpu:0"))
