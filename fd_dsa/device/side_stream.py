"""Second stream of a device, for work that runs alongside the current stream."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from fd_dsa.device.transfers import Transfers
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import DeviceApi, api_for_type
from fd_dsa.triton_runtime.mode import INTERPRETING


class SideStream:
    """Stream alongside the current one of a device, with one fork at a time.

    All forks share two events, so a fork and its join cost four driver calls and no memory. In a
    capture they become edges of the graph.

    The order of calls is `begin`, work, `end`, `join`. Between `end` and `join` the current stream
    takes work that runs at the same time. One thread at a time.

    Memory. A tensor library reuses freed memory at once, for work on the stream that it believes
    the memory belongs to. The caller therefore holds every tensor that the work between `begin`
    and `end` reads or makes until `join`, temporaries included. Afterwards the tensors may be
    freed: later work of the current stream runs after the join, and later work of this stream
    after the next `begin`.
    """

    def __init__(self, api: DeviceApi, device: int) -> None:
        self._transfers = transfers = Transfers(api, device)
        self._api, self._device = api, device
        self.stream = api.new_stream(device)
        self._handle = ctypes.c_void_p(api.stream_handle(self.stream))
        self._main = ctypes.c_void_p()
        self._before: Any = None
        self._forked, self._done = transfers.event(), transfers.event()

    def begin(self) -> None:
        """Make this stream the current one, after all work of the current one so far.

        After a DeviceError the current stream is unchanged.
        """
        self._main = self._transfers.stream()
        self._forked.record(self._main)
        self._forked.precede(self._handle)
        self._before = self._api.swap_stream(self._device, self.stream)

    def end(self) -> None:
        """Make the stream from before `begin` the current one again. Enqueued work continues."""
        before, self._before = self._before, None
        self._api.swap_stream(self._device, before)
        self._done.record(self._handle)

    def join(self) -> None:
        """Make the stream from before `begin` wait for all work enqueued before `end`."""
        self._done.precede(self._main)


def side_stream_for(tensor: Tensor) -> SideStream | None:
    """Return the second stream of the device of a tensor, which all callers share.

    Returns:
        The stream, made at the first call of the process. None if kernels are interpreted, because
        the "device" is then host memory.
    """
    if INTERPRETING:
        return None
    api = api_for_type(type(tensor))
    return shared_side_stream(api, api.device_of(tensor))


shared_side_stream = cache(SideStream)
"""Make the side stream of a device once; `cache_clear` drops all."""
