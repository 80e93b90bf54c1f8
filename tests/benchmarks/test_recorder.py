"""The result file of a GPU benchmark: shapes that fail, shapes without time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import _gpu
from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME

TIMED = ["first, timed", "bad, timed", "last, timed"]
TIMES = {"ours": {"p20": 1.0, "p50": 2.0, "p80": 3.0}}


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a GPU is measured."""
    monkeypatch.setattr(_gpu, "ceilings", lambda: {"copy_bytes_per_s": 4e12, "node_us": 0.5})
    monkeypatch.setattr(_gpu, "clocks", dict)
    monkeypatch.setattr(_gpu, "register", lambda: None)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "it.json").read_text())


def timed(record: _gpu.Recorder, name: str) -> None:
    """One case; "bad" fails after it."""
    record.case(f"{name}, timed", TIMES, ours="ours")
    if name == "bad":
        raise RuntimeError("no such kernel")


def add(record: _gpu.Recorder, name: str) -> None:
    """An attempt of one case."""
    record.attempt(name, partial(timed, record, name))


def test_a_shape_that_fails_leaves_the_others(tmp_path: Path) -> None:
    with _gpu.Recorder("it", tmp_path) as record:
        for name in ("first", "bad", "last"):
            add(record, name)
        record.attempt("wrong", lambda: False)
    found = result(tmp_path)
    assert [case["case"] for case in found["cases"]] == TIMED and not found["not_run"]
    assert found["failed"] == {"bad": "RuntimeError: no such kernel", "wrong": "a side is wrong"}
    assert record.status() == 1


def test_no_case_is_begun_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _gpu.Recorder("it", tmp_path) as record:
        add(record, "first")
        monkeypatch.setattr(record, "end_s", 0.0)
        add(record, "second")
    assert result(tmp_path)["not_run"] == ["second"] and record.status() == OUT_OF_TIME
    assert [case["case"] for case in result(tmp_path)["cases"]] == ["first, timed"]
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    with _gpu.Recorder("it", tmp_path) as record:
        add(record, "first")
    assert result(tmp_path)["not_run"] == ["first"]


def test_sides_that_fail_or_are_wrong_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu.torch.cuda, "synchronize", lambda: None)
    errors: dict[str, Any] = {"right": 0.1, "wrong": 0.3, "none": float("nan")}

    def check(label: str) -> float:
        if label == "refuses":
            raise RuntimeError("no such shape")
        return errors[label]

    sides: dict[str, list[Any]] = {label: [label] for label in (*errors, "refuses")}
    good, found, left_out = _gpu.checked("a case", sides, check, most=0.2)
    assert good == {"right": ["right"]} and list(found) == list(errors)
    assert left_out["refuses"] == "no such shape" and set(left_out) == {"wrong", "none", "refuses"}

    def assert_fails(label: str) -> float:
        raise AssertionError("a position twice")

    with pytest.raises(AssertionError, match="twice"):
        _gpu.checked("a case", sides, assert_fails, most=0.2)
