"""Forks of the indexer's projections: their order, what goes wrong, and where nothing forks."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS, overlap_max_tokens
from fd_dsa.errors import ConfigError, DeviceError, KernelUnavailable, OverlapError

FORKED, IN_LINE = 8, 9


class Noted:
    """An overlap of up to 8 tokens, whose second stream and work write one log.

    It stands for the second stream, too; calls in `refuses` fail as the driver would.
    """

    def __init__(self, *refuses: str) -> None:
        self.log: list[str] = []
        self._refuses = refuses
        self.overlap = IndexerOverlap("gpu:0", 8)
        self.overlap.side_stream = self

    def _note(self, name: str) -> None:
        self.log.append(name)
        if name in self._refuses:
            raise DeviceError(f"{name}: CUDA error 901")

    def begin(self) -> None:
        self._note("begin")

    def end(self) -> None:
        self._note("end")

    def join(self) -> None:
        self._note("join")

    def project(self, x: Any) -> Any:
        self.log.append("project")
        return x + 1

    def work(self) -> str:
        self.log.append("work")
        return "done"

    def run(self, num_tokens: int = FORKED, x: Any = 4) -> tuple[Any, Any]:
        return self.overlap.run(num_tokens, self.work, self.project, x)


@pytest.mark.parametrize("num_tokens", [0, IN_LINE, 1 << 20])
def test_a_long_step_and_an_empty_one_do_not_fork(num_tokens: int) -> None:
    noted = Noted()
    assert noted.run(num_tokens) == ("done", 5)
    assert noted.log == ["work", "project"]


@pytest.mark.parametrize("inner", ["project", "work"])
@pytest.mark.parametrize("num_tokens", [FORKED, IN_LINE])
def test_forks_are_not_nested(num_tokens: int, inner: str) -> None:
    noted = Noted()
    setattr(noted, inner, lambda *_: noted.overlap.run(1, list, noted.project, 4))
    with pytest.raises(OverlapError, match="forks cannot be nested"):
        noted.run(num_tokens)
    assert noted.log.count("begin") == noted.log.count("join")
    del noted.__dict__[inner]
    assert noted.run() == ("done", 5)


@pytest.mark.parametrize("refuses", [(), ("end",), ("join",), ("end", "join")])
def test_an_exception_of_the_projection_leaves_nothing_forked(refuses: tuple[str, ...]) -> None:
    noted = Noted(*refuses)
    with pytest.raises(TypeError, match="NoneType"):
        noted.run(x=None)
    assert noted.log == ["begin", "project", "end", "join"]


@pytest.mark.parametrize("num_tokens", [FORKED, IN_LINE])
@pytest.mark.parametrize("refuses", [(), ("join",)])
def test_an_exception_of_the_work_joins_back_and_goes_on(
    refuses: tuple[str, ...], num_tokens: int
) -> None:
    noted = Noted(*refuses)
    with pytest.raises(ZeroDivisionError):
        noted.overlap.run(num_tokens, lambda: 1 // 0, noted.project, 4)
    assert noted.log == (["begin", "project", "end", "join"] if num_tokens == FORKED else [])
    if not refuses:
        assert noted.run() == ("done", 5)


@pytest.mark.parametrize("num_tokens", [FORKED, IN_LINE])
def test_a_failed_compilation_selects_another_kernel(num_tokens: int) -> None:
    noted, errors = Noted(), [KernelUnavailable("ptxas died") for _ in range(2)]

    def project(x: int) -> int:
        if errors:
            raise errors.pop()
        return noted.project(x)

    with pytest.raises(KernelUnavailable, match="ptxas died"):
        noted.overlap.run(num_tokens, noted.work, project, 4)
    noted.log.clear()
    found = noted.overlap.run(
        num_tokens, noted.work, project, 4, refuse=lambda error: noted.log.append(str(error))
    )
    assert found == ("done", 5)
    forked = ["begin", "end", "join", "ptxas died", "work", "project"]
    assert noted.log == (forked if num_tokens == FORKED else ["work", "ptxas died", "project"])


def test_arguments_and_results_are_held_until_the_join_and_not_longer() -> None:
    noted, kept = Noted(), []

    def project(x: np.ndarray) -> np.ndarray:
        kept.append(weakref.ref(result := x + 1))
        return result

    def work() -> None:
        gc.collect()
        assert all(held() is not None for held in kept)

    x = [np.zeros(3)]
    kept.append(weakref.ref(x[0]))
    noted.overlap.run(1, work, project, x.pop())
    gc.collect()
    assert [held() for held in kept] == [None, None]


def test_a_cpu_has_no_second_stream_and_loads_no_launcher() -> None:
    code = (
        "import sys, numpy as np\n"
        "from fd_dsa.attention.overlap import IndexerOverlap\n"
        "for overlap in (IndexerOverlap('cpu'), IndexerOverlap('cpu', 1 << 20)):\n"
        "    _, found = overlap.run(4, list, np.negative, np.ones(4))\n"
        "    assert (found == -1).all() and overlap.max_tokens == 0\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "tokens"),
    [("", None), (" 0 ", 0), ("77", 77)],
    ids=["default", "off", "a number"],
)
def test_the_threshold_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, tokens: int | None
) -> None:
    monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", value)
    assert overlap_max_tokens() == tokens
    overlap, given = IndexerOverlap("gpu"), IndexerOverlap("gpu", 5)
    # without a number eager steps do not fork
    known = DEFAULT_OVERLAP_MAX_TOKENS if tokens is None else tokens
    assert (overlap.max_tokens, overlap.eager) == (known, tokens is not None)
    assert (given.max_tokens, given.eager) == (5, True)


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_a_threshold_that_is_no_count_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", value)
    with pytest.raises(ConfigError, match="FD_DSA_OVERLAP_MAX_TOKENS: got"):
        overlap_max_tokens()
