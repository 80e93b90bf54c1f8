"""Launches on Paddle tensors, whose places are those of a GPU, a custom device or the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime import device_api, register_device_api
from fd_dsa.triton_runtime.device_api import PaddleApi
from tests.triton_runtime.fakes import FakeLibrary, FakeTensor, scale_kernel

pytestmark = pytest.mark.triton

MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """Place of a Paddle tensor, of one kind."""

    kind: str
    index: int = 0

    def is_gpu_place(self) -> bool:
        return self.kind == "gpu"

    def is_custom_place(self) -> bool:
        return self.kind == "custom"

    def custom_device_type(self) -> str:
        return "hopper"

    # Paddle answers for places of all kinds
    def gpu_device_id(self) -> int:
        return self.index

    custom_device_id = gpu_device_id


HOST, PINNED = Place("cpu"), Place("gpu_pinned")


class PaddleTensor(FakeTensor):
    """A tensor that has a place.

    Attributes:
        asked: how often its place was asked for.
    """

    def __init__(self, address: int, place: Place, shape: tuple[int, ...] = (64,)) -> None:
        super().__init__(address, shape=shape)
        self._place, self.asked = place, 0

    @property
    def place(self) -> Place:
        self.asked += 1
        return self._place


@pytest.fixture(params=["gpu", "custom"])
def device(request: pytest.FixtureRequest) -> Place:
    """Device 0, as both kinds of places."""
    return Place(request.param)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Bytes of each device that Paddle holds."""
    from paddle.base import core

    held: Counter[int] = Counter({0: MIB, 1: MIB})

    def answer(kind: str, device: int) -> int:
        assert kind == "Reserved"
        return held[device]

    monkeypatch.setattr(core, "device_memory_stat_current_value", answer)
    return held


@pytest.fixture
def launch(library: FakeLibrary, held: Counter[int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A launch of `scale_kernel` on two tensors, in a process that sees two devices."""
    library.num_devices = 2
    monkeypatch.setattr(device_api, "has_nvidia_gpu", lambda: True)
    api, kernel = PaddleApi(), scale_kernel()
    monkeypatch.setattr(api, "current_stream", lambda device: 0xABC0, raising=False)
    register_device_api(PaddleTensor, api)
    return lambda x, y: kernel[(1,)](x, y, 5, 0.5, True, 7, BLOCK=64)


def test_tensors_on_a_device_are_launched_on(
    library: FakeLibrary, launch: Any, device: Place
) -> None:
    for _ in range(3):
        tensors = [PaddleTensor(address, device) for address in (0x7000, 0x8000, 0x9000)]
        launch(tensors[0], tensors[1])
        launch(tensors[2], tensors[1])
    assert [found.values[0] for found in library.launches] == [0x7000, 0x9000] * 3
    # each address was found on the device before
    assert [tensor.asked for tensor in tensors] == [0, 0, 0]


@pytest.mark.parametrize("place", [HOST, PINNED], ids=lambda place: place.kind)
def test_host_memory_is_refused_after_launches(
    library: FakeLibrary, launch: Any, device: Place, place: Place
) -> None:
    tensor = PaddleTensor(0x7000, device)
    for _ in range(3):
        launch(tensor, tensor)
    for wrong in ((PaddleTensor(0x9000, place), tensor), (tensor, PaddleTensor(0x9000, place))):
        with pytest.raises(LaunchError, match=r"argument '[xy]_ptr': the tensor is on Place"):
            launch(*wrong)
    assert len(library.launches) == 3


def test_another_device_is_refused_after_launches(
    library: FakeLibrary, launch: Any, device: Place
) -> None:
    tensor, there = PaddleTensor(0x7000, device), PaddleTensor(0x9000, Place(device.kind, 1))
    for _ in range(3):
        launch(tensor, tensor)
    for wrong in ((there, tensor), (tensor, there)):
        with pytest.raises(LaunchError, match="put all on one device"):
            launch(*wrong)
    with pytest.raises(LaunchError, match="on device 1, but the current device is 0"):
        launch(there, there)
    library.enter(0x1001)
    for _ in range(3):
        launch(there, there)
    with pytest.raises(LaunchError, match="on device 0, but the current device is 1"):
        launch(tensor, tensor)
    assert len(library.launches) == 6


@pytest.mark.parametrize("new", [-MIB, MIB])
def test_an_address_has_a_new_owner_once_paddle_holds_other_memory(
    launch: Any, held: Counter[int], device: Place, new: int
) -> None:
    tensor, other = PaddleTensor(0x7000, device), PaddleTensor(0x8000, device)
    for _ in range(3):
        launch(tensor, other)
    held[0] += new
    for place, message in (
        (HOST, "the tensor is on Place"),
        (Place(device.kind, 1), "put all on one device"),
    ):
        with pytest.raises(LaunchError, match=message):
            launch(PaddleTensor(0x7000, place), other)
    launch(tensor, other)


@pytest.mark.parametrize("address", [0, 0x7000])
def test_an_empty_tensor_tells_nothing_of_its_address(
    launch: Any, device: Place, address: int
) -> None:
    empty, other = PaddleTensor(address, device, (0, 4)), PaddleTensor(0x8000, device)
    for _ in range(3):
        launch(empty, other)
    with pytest.raises(LaunchError, match="the tensor is on Place"):
        launch(PaddleTensor(address, HOST, (0, 4)), other)


def test_many_addresses(library: FakeLibrary, launch: Any, device: Place) -> None:
    count = 70_000
    for number in range(count):
        launch(PaddleTensor(0x10000 + 256 * number, device), PaddleTensor(0x8000, device))
    assert len(library.launches) == count
    with pytest.raises(LaunchError, match="the tensor is on Place"):
        launch(PaddleTensor(0x9000, HOST), PaddleTensor(0x8000, device))
