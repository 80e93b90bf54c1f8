"""Ranks as processes of one machine, over memory that they share.

The memory is a file without a name and the signals are eventfds: nothing is left of them when the
processes have ended, however they ended, and two servers never meet. Who waits sleeps.
"""

from __future__ import annotations

import mmap
import os
import select
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from fd_dsa.distributed.group import Group
from fd_dsa.errors import RankError

# bytes that a rank shows the others at a time, and of a part of a message
_PIECE = 1 << 20
# parts of messages that may wait for a rank that has not read them
_NUM_PARTS = 4
_LENGTH_BYTES = 8
_LOOK_EVERY_MS = 100


class Shared(NamedTuple):
    """File descriptors that the ranks of a group have in common.

    Attributes:
        memory: of the shared file: two pieces of each rank, then the parts of messages.
        arrived: [from][to]; how often one rank has come to a meeting that the other has not seen.
        filled, free: [to]; parts of messages of rank 0 that hold something, and that do not.
    """

    memory: int
    arrived: tuple[tuple[int, ...], ...]
    filled: tuple[int, ...]
    free: tuple[int, ...]

    @classmethod
    def create(cls, size: int) -> Shared:
        memory = os.memfd_create("fd_dsa-ranks")
        os.ftruncate(memory, (2 * size + _NUM_PARTS) * _PIECE)
        flags = os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC
        return cls(
            memory,
            tuple(tuple(os.eventfd(0, flags) for _ in range(size)) for _ in range(size)),
            tuple(os.eventfd(0, flags) for _ in range(size)),
            tuple(os.eventfd(_NUM_PARTS, flags) for _ in range(size)),
        )

    @property
    def descriptors(self) -> list[int]:
        return [self.memory, *(fd for row in self.arrived for fd in row), *self.filled, *self.free]


class HostGroup(Group):
    """A group whose tensors are NumPy arrays, and in which rank 0 sends the others messages.

    Also the group of processes whose model is on devices, for what their hosts exchange. One thread
    at a time. `shared` is what `Shared.create` gave rank 0.

    Attributes:
        has_devices: whether the ranks also meet on devices, where no failure is raised.
        failure: what has ended another rank, raised in every wait for one; None: nothing.
    """

    failure: RankError | None

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size = rank, len(shared.filled)
        self.has_devices, self.failure = False, None
        self._shared, self._turn, self._part, self._is_open = shared, 0, 0, True
        # the others are ended by rank 0, or with it
        self._look_every_ms = None if rank else _LOOK_EVERY_MS
        mapped = mmap.mmap(shared.memory, (2 * self.size + _NUM_PARTS) * _PIECE)
        pieces = np.frombuffer(mapped, np.uint8).reshape(-1, _PIECE)
        # a rank fills one of its two while others may still read what it showed before
        self._pieces = pieces[: 2 * self.size].reshape(2, self.size, _PIECE)
        self._parts = pieces[2 * self.size :]
        self._polls = {}
        for fd in shared.descriptors[1:]:
            self._polls[fd] = select.poll()
            self._polls[fd].register(fd, select.POLLIN)

    def all_reduce(self, tensor: np.ndarray) -> np.ndarray:
        """See `Group`; the sum is a new array."""
        x = np.ascontiguousarray(tensor)
        total, flat = np.empty_like(x), x.reshape(-1)
        sums, length = total.reshape(-1), _PIECE // x.itemsize
        for start in range(0, len(flat), length):
            part = sums[start : start + length]
            first, *others = self._shown(flat[start : start + length])
            np.copyto(part, first)
            for other in others:
                part += other
        return total

    def all_gather(self, tensor: np.ndarray) -> np.ndarray:
        """See `Group`; a new array."""
        x = np.ascontiguousarray(tensor)
        gathered, flat = np.empty((self.size, *x.shape), x.dtype), x.reshape(-1)
        rows, length = gathered.reshape(self.size, -1), _PIECE // x.itemsize
        for start in range(0, len(flat), length):
            parts = self._shown(flat[start : start + length])
            for row, part in zip(rows, parts, strict=True):
                row[start : start + length] = part
        return gathered

    def barrier(self) -> None:
        self._meet()

    def send(self, message: bytes) -> None:
        """Give all other ranks a message, from rank 0; waits while they are some messages behind.

        Raises:
            RankError: a rank has ended.
        """
        data = np.frombuffer(len(message).to_bytes(_LENGTH_BYTES, "little") + message, np.uint8)
        for start in range(0, len(data), _PIECE):
            for rank in range(1, self.size):
                self.wait_eventfd(self._shared.free[rank])
            part = data[start : start + _PIECE]
            self._parts[self._part, : len(part)] = part
            self._part = (self._part + 1) % _NUM_PARTS
            for rank in range(1, self.size):
                os.eventfd_write(self._shared.filled[rank], 1)

    def receive(self) -> bytes:
        """The next message of rank 0, which is waited for."""
        data = self._next_part(None)
        missing = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little") - len(data)
        while missing:
            data += self._next_part(missing)
            missing = max(missing - _PIECE, 0)
        return data[_LENGTH_BYTES:]

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            for fd in self._shared.descriptors:
                with suppress(OSError):
                    os.close(fd)

    def _next_part(self, missing: int | None) -> bytes:
        """A part of a message of which so many bytes are missing; None: its first part."""
        self.wait_eventfd(self._shared.filled[self.rank])
        part = self._parts[self._part]
        if missing is None:
            missing = _LENGTH_BYTES + int(part[:_LENGTH_BYTES].view("<i8")[0])
        data = part[: min(missing, _PIECE)].tobytes()
        self._part = (self._part + 1) % _NUM_PARTS
        os.eventfd_write(self._shared.free[self.rank], 1)
        return data

    def _shown(self, part: np.ndarray) -> list[np.ndarray]:
        """What each rank shows, as short as a piece; valid until the next call but one."""
        self._turn ^= 1
        views = [piece[: part.nbytes].view(part.dtype) for piece in self._pieces[self._turn]]
        views[self.rank][...] = part
        self._meet()
        return views

    def _meet(self) -> None:
        """Wait until every rank has called this."""
        arrived, others = self._shared.arrived, [r for r in range(self.size) if r != self.rank]
        self.check()
        for rank in others:
            os.eventfd_write(arrived[self.rank][rank], 1)
        for rank in others:
            self.wait_eventfd(arrived[rank][self.rank])

    def wait_eventfd(self, fd: int) -> None:
        """Take one signal, which is waited for."""
        while True:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                self._polls[fd].poll(self._look_every_ms)
                self.check()
            else:
                return
