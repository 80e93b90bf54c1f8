"""Prints how a launch goes on memory that a device had, and that the host has now.

`python -m tests.null_driver.freed_memory`.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

from fd_dsa.errors import FdDsaError
from tests.null_driver.engine import NullDriver

SIZE = 1 << 20
MAP_FIXED_NOREPLACE = 0x100000


def host_tensor(address: int) -> Any:
    """Make a tensor in host memory that begins at a free address."""
    import paddle

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    size, start = ctypes.c_size_t(4 * SIZE), ctypes.c_void_p(address)
    assert libc.mmap(start, size, access, flags, -1, ctypes.c_long(0)) == address
    numbers = np.ctypeslib.as_array((ctypes.c_float * SIZE).from_address(address))
    tensor = paddle.from_dlpack(numbers)
    assert tensor.data_ptr() == address
    return tensor


def main() -> None:
    """Launch on memory of the device, return it to the driver, and launch on it as host memory."""
    driver = NullDriver()
    import paddle

    from tests.triton_runtime.fakes import scale_kernel

    kernel = scale_kernel()
    x, y = (paddle.empty([SIZE], dtype="float32", device=driver.device) for _ in range(2))
    for _ in range(3):
        kernel[(1,)](x, y, 5, 0.5, True, 7, BLOCK=64)
    print(driver.launches(), "launches")
    address = x.data_ptr()
    del x
    paddle.device.empty_cache()
    try:
        kernel[(1,)](host_tensor(address), y, 5, 0.5, True, 7, BLOCK=64)
    except FdDsaError as error:
        print(error)


if __name__ == "__main__":
    main()
