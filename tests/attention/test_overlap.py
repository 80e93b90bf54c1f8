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
from fd_dsa.errors import ConfigError, DeviceError, OverlapError


class NotedStream:
    """A second stream that notes its calls; `refuses` fail as the driver would."""

    def __init__(self, log: list[str], refuses: tuple[str, ...] = ()) -> None:
        self._log, self._refuses = log, refuses

    def _note(self, name: str) -> None:
        self._log.append(name)
        if name in self._refuses:
            raise DeviceError(f"{name}: CUDA error 901")

    def begin(self) -> None:
        self._note("begin")

    def end(self) -> None:
        self._note("end")

    def join(self) -> None:
        self._note("join")


class Noted:
    """An overlap of up to 8 tokens whose second stream and work write one log."""

    def __init__(self, *refuses: str) -> None:
        self.log: list[str] = []
        self.overlap = IndexerOverlap("gpu:0", 8)
        self.overlap.side_stream = NotedStream(self.log, refuses)

    def project(self, x: Any) -> Any:
        self.log.append("project")
        if x is None:
            raise RuntimeError("project failed")
        return x + 1


def test_work_is_begun_at_the_fork_and_joined_behind_the_block() -> None:
    noted = Noted()
    with noted.overlap.fork(8, noted.project, 4) as side:
        noted.log.append("beside")
        assert side.join() == 5
        noted.log.append("after")
    assert noted.log == ["begin", "project", "end", "beside", "join", "after"]


@pytest.mark.parametrize("num_tokens", [0, 9, 1 << 20])
def test_a_long_step_and_an_empty_one_do_not_fork(num_tokens: int) -> None:
    noted = Noted()
    with noted.overlap.fork(num_tokens, noted.project, 4) as side:
        noted.log.append("beside")
        assert side.join() == 5
    assert noted.log == ["beside", "project"]


def test_the_next_fork_follows_a_finished_one() -> None:
    noted = Noted()
    for start in range(3):
        with noted.overlap.fork(1, noted.project, start) as side:
            assert side.join() == start + 1
    assert noted.log == ["begin", "project", "end", "join"] * 3


@pytest.mark.parametrize("num_tokens", [1, 9], ids=["forked", "in line"])
def test_a_missing_join_is_an_error(num_tokens: int) -> None:
    noted = Noted()
    with (
        pytest.raises(OverlapError, match="ended without join"),
        noted.overlap.fork(num_tokens, noted.project, 4),
    ):
        pass
    # the streams are joined all the same, so that a capture can end
    assert noted.log == (["begin", "project", "end", "join"] if num_tokens == 1 else [])
    with noted.overlap.fork(1, noted.project, 4) as side:
        assert side.join() == 5


@pytest.mark.parametrize("num_tokens", [1, 9], ids=["forked", "in line"])
def test_a_join_needs_its_fork(num_tokens: int) -> None:
    noted = Noted()
    fork = noted.overlap.fork(num_tokens, noted.project, 4)
    with pytest.raises(OverlapError, match="inside of the `with` block"):
        fork.join()
    with fork as side:
        side.join()
        with pytest.raises(OverlapError, match="allowed is one"):
            side.join()
    with pytest.raises(OverlapError, match="inside of the `with` block"):
        fork.join()
    with pytest.raises(OverlapError, match="this one has run"), fork:
        pass


def test_forks_are_not_nested() -> None:
    noted = Noted()
    with noted.overlap.fork(1, noted.project, 4) as side:
        with pytest.raises(OverlapError, match="not nested"), noted.overlap.fork(1, noted.project):
            pass
        assert side.join() == 5
    assert noted.log == ["begin", "project", "end", "join"]


def test_a_projection_that_forks_is_an_error_and_leaves_nothing() -> None:
    noted = Noted()

    def project(x: Any) -> Any:
        with noted.overlap.fork(1, noted.project, x) as inner:
            return inner.join()

    with pytest.raises(OverlapError, match="not nested"), noted.overlap.fork(1, project, 4):
        pass
    assert noted.log == ["begin", "end", "join"] and noted.overlap.current is None


@pytest.mark.parametrize("refuses", [(), ("end",), ("join",), ("end", "join")])
def test_an_exception_of_the_projection_leaves_nothing_forked(refuses: tuple[str, ...]) -> None:
    noted = Noted(*refuses)
    with (
        pytest.raises(RuntimeError, match="project failed"),
        noted.overlap.fork(1, noted.project, None),
    ):
        pytest.fail("the block must not begin")
    assert noted.log == ["begin", "project", "end", "join"] and noted.overlap.current is None


@pytest.mark.parametrize("refuses", [(), ("join",)])
def test_an_exception_beside_it_joins_back_and_goes_on(refuses: tuple[str, ...]) -> None:
    noted = Noted(*refuses)
    with pytest.raises(KeyError, match="beside"), noted.overlap.fork(1, noted.project, 4):
        raise KeyError("beside")
    assert noted.log == ["begin", "project", "end", "join"] and noted.overlap.current is None


def test_an_exception_in_line_runs_nothing() -> None:
    noted = Noted()
    with pytest.raises(KeyError), noted.overlap.fork(9, noted.project, 4):
        raise KeyError("beside")
    assert noted.log == [] and noted.overlap.current is None


def test_arguments_and_results_are_held_until_the_join_and_not_longer() -> None:
    noted = Noted()
    x = np.zeros(3)
    given = weakref.ref(x)
    with noted.overlap.fork(1, noted.project, x) as side:
        del x
        gc.collect()
        assert given() is not None
        made = weakref.ref(side.join())
    gc.collect()
    assert given() is None and made() is None


def test_a_cpu_never_has_a_second_stream() -> None:
    overlap = IndexerOverlap("cpu", 1 << 20)
    with overlap.fork(4, np.negative, np.ones(4)) as side:
        np.testing.assert_array_equal(side.join(), -np.ones(4))
    assert overlap.max_tokens == 0


def test_the_launcher_is_not_loaded_for_a_cpu() -> None:
    code = (
        "import sys, numpy as np\n"
        "from fd_dsa.attention.overlap import IndexerOverlap\n"
        "with IndexerOverlap('cpu').fork(4, np.negative, np.ones(4)) as side: side.join()\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.triton
def test_where_kernels_are_interpreted_nothing_forks() -> None:
    from fd_dsa.triton_runtime import INTERPRETING

    if not INTERPRETING:
        pytest.skip("kernels are compiled in this process; set TRITON_INTERPRET=1 to interpret")
    overlap = IndexerOverlap("gpu:0", 8)
    with overlap.fork(4, np.negative, np.ones(4)) as side:
        np.testing.assert_array_equal(side.join(), -np.ones(4))
    assert overlap.side_stream is None


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
