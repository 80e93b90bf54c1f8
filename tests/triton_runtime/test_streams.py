"""The second stream of a device: the driver calls of a fork and its join, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS
from fd_dsa.errors import DeviceError
from fd_dsa.triton_runtime import driver, register_device_api, streams, transfers
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor

pytestmark = pytest.mark.triton

MAIN, SIDE = 0xABC0, 0x51DE
X = FakeTensor(0x7000)


@dataclass(eq=False)
class StreamApi(FakeApi):
    """A library with streams; each is its own handle."""

    log: list[Any] = field(default_factory=list)
    priorities: list[bool] = field(default_factory=list)

    def new_stream(self, device: int, high_priority: bool) -> int:
        self.priorities.append(high_priority)
        return SIDE + device

    def stream_handle(self, stream: int) -> int:
        return stream

    def swap_stream(self, device: int, stream: int) -> int:
        before, self.stream = self.stream, stream
        self.log.append(("current", stream))
        return before


class EventLibrary(FakeLibrary):
    """A driver with events, which notes what is asked of them; calls in `refused` fail."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__(num_devices=2)
        self.log, self.refused, self.events = log, set[str](), 0
        self.captured: set[int] = set()

    def _note(self, call: str, event: Any, stream: Any) -> int:
        if self.needs_context and self.context() is None:
            return 201
        self.log.append((call, event.value, stream.value))
        return 901 if call in self.refused else 0

    def cuEventCreate(self, event: Any, flags: Any) -> int:
        self.events += 1
        event._obj.value = self.events
        assert flags.value == 2, "an event with timing costs more"
        return 0

    def cuStreamIsCapturing(self, stream: Any, status: Any) -> int:
        status._obj.value = int(stream.value in self.captured)
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        return self._note("record", event, stream)

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> int:
        assert flags.value == 0
        return self._note("wait", event, stream)


@pytest.fixture
def api() -> StreamApi:
    api = StreamApi()
    register_device_api(FakeTensor, api)
    return api


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, api: StreamApi) -> Iterator[EventLibrary]:
    """The driver of one test, in a process whose kernels are compiled."""
    library = EventLibrary(api.log)
    monkeypatch.setattr(driver, "_open_library", lambda: library)
    for module in (streams, transfers):
        monkeypatch.setattr(module, "INTERPRETING", False)
    driver.cuda.cache_clear()
    streams._side_stream.cache_clear()
    yield library
    driver.cuda.cache_clear()
    streams._side_stream.cache_clear()


BEGIN = [("record", 1, MAIN), ("wait", 1, SIDE), ("current", SIDE)]
END = [("current", MAIN), ("record", 2, SIDE)]
JOIN = [("wait", 2, MAIN)]


def test_a_fork_and_its_join(api: StreamApi, library: EventLibrary) -> None:
    overlap = IndexerOverlap("gpu", 8)
    # nothing is made before the first fork
    assert library.events == 0 and api.priorities == []

    def project(x: FakeTensor) -> str:
        api.log.append("project")
        assert api.stream == SIDE
        return "keys"

    for _ in range(2):
        api.log.clear()
        with overlap.fork(4, project, X) as side:
            assert api.stream == MAIN
            api.log.append("beside")
            assert side.join() == "keys"
        assert api.log == [*BEGIN, "project", *END, "beside", *JOIN]
    # two events and one stream serve all forks
    assert library.events == 2 and api.priorities == [False]


def test_a_step_past_the_threshold_asks_nothing_of_the_driver(
    api: StreamApi, library: EventLibrary
) -> None:
    for overlap in (IndexerOverlap("gpu", 8), IndexerOverlap("gpu", 0), IndexerOverlap("cpu", 99)):
        with overlap.fork(9, lambda x: api.stream, X) as side:
            assert side.join() == MAIN
    assert api.log == [] and library.events == 0 and api.priorities == []


def test_by_default_steps_fork_in_a_capture_alone(
    api: StreamApi, library: EventLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FD_DSA_OVERLAP_MAX_TOKENS", raising=False)
    overlap = IndexerOverlap("gpu")

    def stream_of_work(num_tokens: int) -> int:
        with overlap.fork(num_tokens, lambda x: api.stream, X) as side:
            return side.join()

    assert stream_of_work(4) == MAIN and library.events == 0 and api.priorities == []
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


def test_an_exception_of_the_work_ends_with_the_streams_joined(
    api: StreamApi, library: EventLibrary
) -> None:
    def project(x: FakeTensor) -> None:
        raise KeyError("work")

    with pytest.raises(KeyError), IndexerOverlap("gpu", 8).fork(4, project, X):
        pass
    assert api.log == [*BEGIN, *END, *JOIN] and api.stream == MAIN


def test_an_exception_beside_it_ends_with_the_streams_joined(
    api: StreamApi, library: EventLibrary
) -> None:
    with pytest.raises(KeyError), IndexerOverlap("gpu", 8).fork(4, lambda x: None, X):
        raise KeyError("beside")
    assert api.log == [*BEGIN, *END, *JOIN] and api.stream == MAIN


@pytest.mark.parametrize("refused", ["record", "wait"])
def test_a_fork_that_the_driver_refuses_changes_nothing(
    api: StreamApi, library: EventLibrary, refused: str
) -> None:
    overlap = IndexerOverlap("gpu", 8)
    library.refused = {refused}
    with (
        pytest.raises(DeviceError, match="CUDA error 901"),
        overlap.fork(4, lambda x: None, X),
    ):
        pass
    assert api.stream == MAIN and ("current", SIDE) not in api.log
    library.refused = set()
    with overlap.fork(4, lambda x: 5, X) as side:
        assert side.join() == 5


def test_a_refused_end_gives_the_stream_back(api: StreamApi, library: EventLibrary) -> None:
    def project(x: FakeTensor) -> None:
        library.refused = {"record"}

    with pytest.raises(DeviceError), IndexerOverlap("gpu", 8).fork(4, project, X):
        pass
    assert api.stream == MAIN


def test_a_thread_without_a_context_gets_the_devices(api: StreamApi, library: EventLibrary) -> None:
    library.needs_context = True
    with IndexerOverlap("gpu", 8).fork(4, lambda x: 5, FakeTensor(0x7000, device=1)) as side:
        assert side.join() == 5
    assert library.context() == 0x1001
    assert ("wait", 1, SIDE + 1) in api.log


def test_every_device_has_a_stream_of_its_own(api: StreamApi, library: EventLibrary) -> None:
    found = [streams.side_stream_for(FakeTensor(0x7000, device=d)) for d in (0, 1, 0)]
    assert found[0] is found[2] is not found[1]
    assert api.priorities == [False, False] and library.events == 4


def test_a_stream_of_high_priority(api: StreamApi, library: EventLibrary) -> None:
    streams.SideStream(api, 0, high_priority=True)
    assert api.priorities == [True]


def test_where_kernels_are_interpreted_there_is_none(
    api: StreamApi, library: EventLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "INTERPRETING", True)
    assert streams.side_stream_for(X) is None and library.events == 0
