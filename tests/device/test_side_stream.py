"""The second stream of a device: the driver calls of a fork and its join, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.device import side_stream
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS
from fd_dsa.errors import DeviceError
from fd_dsa.triton_runtime import register_device_api
from tests.triton_runtime.fakes import FakeApi, FakeTensor, driven_by
from tests.triton_runtime.late_driver import MAIN, LateLibrary

pytestmark = pytest.mark.triton

SIDE = 0x51DE
X = FakeTensor(0x7000)


@dataclass(eq=False)
class StreamApi(FakeApi):
    """A library with streams; each is its own handle."""

    log: list[Any] = field(default_factory=list)
    num_streams: int = 0

    def new_stream(self, device: int) -> int:
        self.num_streams += 1
        return SIDE + device

    def stream_handle(self, stream: int) -> int:
        return stream

    def swap_stream(self, device: int, stream: int) -> int:
        before, self.stream = self.stream, stream
        self.log.append(("current", stream))
        return before


@pytest.fixture
def api() -> StreamApi:
    api = StreamApi()
    register_device_api(FakeTensor, api)
    return api


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, api: StreamApi) -> Iterator[LateLibrary]:
    """The driver of one test, in a process whose kernels are compiled; it has two devices."""
    monkeypatch.setattr(side_stream, "INTERPRETING", False)
    side_stream.shared_side_stream.cache_clear()
    with driven_by(LateLibrary(num_devices=2)) as library:
        api.log = library.log
        yield library
    side_stream.shared_side_stream.cache_clear()


BEGIN = [("record", MAIN, 1), ("wait", SIDE, 1), ("current", SIDE)]
END = [("current", MAIN), ("record", SIDE, 2)]
JOIN = [("wait", MAIN, 2)]


def test_a_fork_and_its_join(api: StreamApi, library: LateLibrary) -> None:
    overlap = IndexerOverlap("gpu", 8)
    # nothing is made before the first fork
    assert library.num_events == 0 and api.num_streams == 0

    def project(x: FakeTensor) -> str:
        api.log.append("project")
        assert api.stream == SIDE
        return "keys"

    def beside() -> int:
        api.log.append("beside")
        return api.stream

    for _ in range(2):
        api.log.clear()
        assert overlap.run(4, beside, project, X) == (MAIN, "keys")
        assert api.log == [*BEGIN, "project", *END, "beside", *JOIN]
    # two events and one stream serve all forks
    assert library.num_events == 2 and api.num_streams == 1


def test_by_default_steps_fork_in_a_capture_alone(
    api: StreamApi, library: LateLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FD_DSA_OVERLAP_MAX_TOKENS", raising=False)
    overlap = IndexerOverlap("gpu")

    def stream_of_work(num_tokens: int) -> int:
        return overlap.run(num_tokens, lambda: None, lambda x: api.stream, X)[1]

    assert stream_of_work(4) == MAIN and library.num_events == 0 and api.num_streams == 0
    library.captured = {MAIN}
    assert stream_of_work(4) == SIDE
    assert stream_of_work(DEFAULT_OVERLAP_MAX_TOKENS + 1) == MAIN
    library.captured = set()
    assert stream_of_work(4) == MAIN
    # a number that the user sets applies to eager steps, too
    monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", "4")
    overlap = IndexerOverlap("gpu")
    assert stream_of_work(4) == SIDE and stream_of_work(5) == MAIN
    monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", "0")
    overlap, library.captured = IndexerOverlap("gpu"), {MAIN}
    assert stream_of_work(4) == MAIN


@pytest.mark.parametrize("refused", ["cuEventRecord", "cuStreamWaitEvent"])
def test_a_fork_that_the_driver_refuses_changes_nothing(
    api: StreamApi, library: LateLibrary, refused: str
) -> None:
    overlap = IndexerOverlap("gpu", 8)
    library.refused = {refused}
    with pytest.raises(DeviceError, match="CUDA error 900"):
        overlap.run(4, lambda: None, lambda x: None, X)
    assert api.stream == MAIN and ("current", SIDE) not in api.log
    library.refused = set()
    assert overlap.run(4, lambda: 4, lambda x: 5, X) == (4, 5)


def test_a_refused_end_gives_the_stream_back(api: StreamApi, library: LateLibrary) -> None:
    def project(x: FakeTensor) -> None:
        library.refused = {"cuEventRecord"}

    with pytest.raises(DeviceError):
        IndexerOverlap("gpu", 8).run(4, lambda: None, project, X)
    assert api.stream == MAIN


def test_a_thread_without_a_context_gets_the_devices(api: StreamApi, library: LateLibrary) -> None:
    library.needs_context = True
    other = FakeTensor(0x7000, device=1)
    assert IndexerOverlap("gpu", 8).run(4, list, lambda x: 5, other) == ([], 5)
    assert library.context() == 0x1001
    assert ("wait", SIDE + 1, 1) in api.log


def test_every_device_has_a_stream_of_its_own(api: StreamApi, library: LateLibrary) -> None:
    found = [side_stream.side_stream_for(FakeTensor(0x7000, device=d)) for d in (0, 1, 0)]
    assert found[0] is found[2] is not found[1]
    side_stream.SideStream(api, 0)
    assert api.num_streams == 3 and library.num_events == 6
