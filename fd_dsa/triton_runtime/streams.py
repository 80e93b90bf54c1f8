"""A second stream of a device: work is forked to it and joined again, by raw driver events.

Two events serve all forks, so a fork and its join cost four driver calls and no memory. In a
capture they become edges of the graph.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from fd_dsa.triton_runtime.device import DeviceApi, api_for_type
from fd_dsa.triton_runtime.mode import INTERPRETING
from fd_dsa.triton_runtime.transfers import Transfers


class SideStream:
    """A stream beside the current one of a device, with one fork at a time.

    The order of calls is `begin`, work, `end`, `join`; between `end` and `join` the current stream
    takes work that runs at the same time. One thread at a time.

    Memory. Libraries hand freed memory out again at once, for work on the stream that they think
    it belongs to. So what the work between `begin` and `end` reads or makes must be held until
    `join`, its temporaries too. Afterwards anything may be freed: later work of the current stream
    runs after the join, and later work of this one after the next `begin`.

    Args:
        api: library of the tensors.
        device: index of the CUDA device.
        high_priority: the device prefers blocks of this stream's kernels.
    """

    def __init__(self, api: DeviceApi, device: int, *, high_priority: bool = False) -> None:
        self._transfers = transfers = Transfers(api, device)
        self._api, self._device = api, device
        self.stream = api.new_stream(device, high_priority)
        self._handle = ctypes.c_void_p(api.stream_handle(self.stream))
        self._main = ctypes.c_void_p()
        self._before: Any = None
        self._forked, self._done = transfers.event(), transfers.event()

    def begin(self) -> None:
        """Make this stream the current one; it waits for all work of the current one so far.

        Raises:
            DeviceError: the driver refuses; the current stream is as it was.
        """
        self._main = self._transfers.stream()
        self._forked.record(self._main)
        self._forked.precede(self._handle)
        self._before = self._api.swap_stream(self._device, self.stream)

    def end(self) -> None:
        """Make the stream from before `begin` the current one again; what was queued goes on."""
        before, self._before = self._before, None
        self._api.swap_stream(self._device, before)
        self._done.record(self._handle)

    def join(self) -> None:
        """The stream from before `begin` waits for all work that was queued before `end`."""
        self._done.precede(self._main)


def side_stream_for(tensor: Any) -> SideStream | None:
    """The second stream of the device of a tensor, made at the first call; one a process.

    Returns:
        None in a process whose kernels are interpreted: its "devices" are host memory.

    Raises:
        LaunchError: the tensor is not in the memory that kernels of this process use.
        BackendUnavailable: no library is known for its type, or no CUDA driver is found.
    """
    if INTERPRETING:
        return None
    api = api_for_type(type(tensor))
    return _side_stream(api, api.device_of(tensor))


_side_stream = cache(SideStream)
