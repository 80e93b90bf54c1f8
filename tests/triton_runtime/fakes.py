"""A CUDA driver that only takes notes, and tensors that are only an address."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime import DeviceApi, driver, paddle_jit, unfreeze
from fd_dsa.triton_runtime.compiler import Argument, Compiled, argument_codes
from fd_dsa.triton_runtime.driver import HostLibrary

import triton.language as tl


@dataclass
class FakeTensor:
    """A tensor in the memory of a fake device."""

    address: int
    dtype: str = "fake.float32"
    shape: tuple[int, ...] = (64,)
    device: int = 0
    dense: bool = True

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return self.dense


@dataclass(eq=False)
class FakeApi(DeviceApi):
    """Device 0, and whatever stream the test sets."""

    stream: int = 0xABC0
    device: int = 0
    asked: int = field(default=0)

    def device_of(self, tensor: FakeTensor) -> int:
        self.asked += 1
        if tensor.device < 0:
            raise LaunchError("the tensor is in host memory")
        return tensor.device

    def current_device(self) -> int:
        return self.device

    def current_stream(self, device: int) -> int:
        return self.stream


@dataclass(frozen=True)
class Launch:
    """One launch as the driver sees it; `arguments` are the addresses of the values."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    attributes: tuple[tuple[int, bytes], ...]
    values: tuple[Any, ...]


class FakeLibrary(HostLibrary):
    """The functions of libcuda that the launcher calls.

    Attributes:
        launches: what was launched, in order; arguments are read by `codes`.
        codes: `struct` codes of the arguments of the kernel under test.
        num_devices: how many there are.
        needs_context: threads without a context get error 201.
    """

    def __init__(self, codes: str = "", num_devices: int = 1) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.loaded: list[bytes] = []
        self.codes, self.num_devices, self.needs_context = codes, num_devices, False
        self.functions: dict[int, int | None] = {}
        self._local = threading.local()

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"fake error"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.num_devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = {16: 132, 75: 9, 76: 0, 97: 232448}[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context._obj.value = 0x1000 + device
        return 0

    def enter(self, context: int) -> None:
        """Make a context the calling thread's; 0x1000 + device is a device's."""
        self._local.context = context

    def context(self) -> int | None:
        """The calling thread's context."""
        return getattr(self._local, "context", None)

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.context()
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:
        device._obj.value = (self.context() or 0x1000) - 0x1000
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.enter(context.value)
        return 0

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:
        self.loaded.append(image)
        module._obj.value = len(self.loaded)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = 0xF0000 + module.value
        self.functions[function._obj.value] = self.context()
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: None) -> int:
        context = self.context()
        if self.needs_context and context is None:
            return 201
        if context not in (None, self.functions.get(function.value)):
            return 400
        fields = struct.unpack("=IIIIIIIxxxxQQIxxxx", ctypes.string_at(config.value, 56))
        addresses = (ctypes.c_void_p * (len(self.codes) + 1)).from_address(pointers.value)
        values = tuple(
            struct.unpack(f"={code}", ctypes.string_at(address, struct.calcsize(f"={code}")))[0]
            for code, address in zip(self.codes, addresses, strict=False)
        )
        attributes = tuple(
            struct.unpack("=Ixxxx64s", ctypes.string_at(fields[8] + 72 * i, 72))
            for i in range(fields[9])
        )
        # scratch pointers follow the arguments, and are null
        assert ctypes.c_uint64.from_address(addresses[len(self.codes)]).value == 0
        self.launches.append(
            Launch(
                function.value, fields[:3], fields[3:6], fields[6], fields[7], attributes, values
            )
        )
        return 0


@contextmanager
def driven_by(library: Any) -> Iterator[Any]:
    """The library is the CUDA driver's inside, of a process that may interpret its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "open_library", lambda: library)
        driver.cuda.cache_clear()
        yield library
    unfreeze()
    driver.cuda.cache_clear()


def fake_compile(
    fn: Any, arguments: dict[str, Argument], options: dict[str, Any], capability: int
) -> Compiled:
    """Return a compiled kernel in the launcher's form."""
    return Compiled(fn.__name__, b"", "", 0, options["num_warps"], argument_codes(arguments))


def in_threads(work: Callable[[int], Any], count: int) -> None:
    """Call `work` with 0, 1, ... at the same time; an error of one is raised here."""
    start = threading.Barrier(count)

    def begin(index: int) -> None:
        start.wait()
        work(index)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(begin, range(count)))


X, Y = FakeTensor(0x7000), FakeTensor(0x8000)


def scale_kernel(waits: bool = False) -> Any:
    """A kernel with all kinds of parameters and a launch cache of its own."""

    @paddle_jit(do_not_specialize=("n",), contiguous=("x_ptr",), waits=waits)
    def scale_kernel(x_ptr, y_ptr, n, factor, flag, stride, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets * stride, mask=offsets < n).to(tl.float32)
        if flag:
            x = x * factor
        tl.store(y_ptr + offsets, x, mask=offsets < n)

    return scale_kernel


def run_module(cache: Path, *arguments: str, **variables: str) -> str:
    """Return the output of a module in its own process, which compiles into this folder."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)} | variables,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
