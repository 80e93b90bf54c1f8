"""Group of processes of one machine, over memory that they share.

The memory is a file without a name, and the signals are eventfds. The kernel frees both when the
processes end, even after a crash, and two servers never share them. A waiting rank sleeps in
`poll`.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fd_dsa.distributed.group import Group
from fd_dsa.errors import RankError

# bytes of a piece, which a rank writes for the others, and of a part of a message
_PIECE = 1 << 20
# max parts of messages that a rank has not read yet
_NUM_PARTS = 4
_LENGTH_BYTES = 8
_CHECK_EVERY_MS = 100


class Shared(NamedTuple):
    """File descriptors that the ranks of a group have in common.

    Attributes:
        memory: shared file with two pieces for each rank, then the parts of messages.
        arrived: [from][to]; eventfd of the meetings that one rank has reached and the other one
            has not yet counted.
        filled, free: [to]; eventfds of rank 0's parts of messages, unread and writable ones.
    """

    memory: int
    arrived: tuple[tuple[int, ...], ...]
    filled: tuple[int, ...]
    free: tuple[int, ...]

    @classmethod
    def create(cls, size: int) -> Shared:
        """Create the memory and the signals of `size` ranks."""
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
        """All file descriptors, the memory first."""
        return [self.memory, *(fd for row in self.arrived for fd in row), *self.filled, *self.free]


class HostGroup(Group):
    """Group over NumPy arrays, in which rank 0 also sends messages to the other ranks.

    Processes whose model is on devices exchange their host data by it, too. The caller allows one
    thread at a time.

    Args:
        shared: result of `Shared.create` in rank 0.

    Attributes:
        has_devices: True if the ranks also wait for each other on devices, which raise no error.
        failure: error of a rank that has ended, raised by every wait; None = all ranks run.
    """

    failure: RankError | None

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size = rank, len(shared.filled)
        self.has_devices, self.failure = False, None
        self._shared, self._turn, self._part, self._is_open = shared, 0, 0, True
        # rank 0 ends the other ranks, or they end with it
        self._check_every_ms = None if rank else _CHECK_EVERY_MS
        mapped = mmap.mmap(shared.memory, (2 * self.size + _NUM_PARTS) * _PIECE)
        pieces = np.frombuffer(mapped, np.uint8).reshape(-1, _PIECE)
        # a rank fills one of its two pieces while others may still read the other one
        self._pieces = pieces[: 2 * self.size].reshape(2, self.size, _PIECE)
        self._parts = pieces[2 * self.size :]
        self._polls = {}
        for fd in shared.descriptors[1:]:
            self._polls[fd] = select.poll()
            self._polls[fd].register(fd, select.POLLIN)

    def all_reduce(self, tensor: np.ndarray) -> np.ndarray:
        """Sum into a new array, see `Group`."""
        x = np.ascontiguousarray(tensor)
        total, flat = np.empty_like(x), x.reshape(-1)
        sums, length = total.reshape(-1), _PIECE // x.itemsize
        for start in range(0, len(flat), length):
            part = sums[start : start + length]
            first, *others = self._exchange(flat[start : start + length])
            np.copyto(part, first)
            for other in others:
                part += other
        return total

    def all_gather(self, tensor: np.ndarray) -> np.ndarray:
        """Gather into a new array, see `Group`."""
        x = np.ascontiguousarray(tensor)
        gathered, flat = np.empty((self.size, *x.shape), x.dtype), x.reshape(-1)
        rows, length = gathered.reshape(self.size, -1), _PIECE // x.itemsize
        for start in range(0, len(flat), length):
            parts = self._exchange(flat[start : start + length])
            for row, part in zip(rows, parts, strict=True):
                row[start : start + length] = part
        return gathered

    def all_gather_rows(self, rows: np.ndarray, bounds: Sequence[int]) -> None:
        """Gather parts of equal length, padded with zeros, see `Group`."""
        parts = [rows[begin:end] for begin, end in pairwise(bounds)]
        own = np.zeros((max(map(len, parts)), *rows.shape[1:]), rows.dtype)
        own[: len(parts[self.rank])] = parts[self.rank]
        for part, gathered in zip(parts, self.all_gather(own), strict=True):
            part[...] = gathered[: len(part)]

    def barrier(self) -> None:
        self._meet()

    def send(self, message: bytes) -> None:
        """Send a message from rank 0 to all other ranks.

        The call blocks while a rank has `_NUM_PARTS` unread parts.

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
        """Wait for the next message of rank 0 and return it."""
        data = self._next_part(None)
        missing = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little") - len(data)
        while missing:
            data += self._next_part(missing)
            missing = max(missing - _PIECE, 0)
        return data[_LENGTH_BYTES:]

    def check(self) -> None:
        """Check that no rank is known to have ended.

        Raises:
            RankError: names the rank that has ended.
        """
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            for fd in self._shared.descriptors:
                with suppress(OSError):
                    os.close(fd)

    def _next_part(self, missing: int | None) -> bytes:
        """Wait for the next part of a message and return its bytes.

        Args:
            missing: bytes of the message that have not arrived; None = its first part.
        """
        self.wait_eventfd(self._shared.filled[self.rank])
        part = self._parts[self._part]
        if missing is None:
            missing = _LENGTH_BYTES + int(part[:_LENGTH_BYTES].view("<i8")[0])
        data = part[: min(missing, _PIECE)].tobytes()
        self._part = (self._part + 1) % _NUM_PARTS
        os.eventfd_write(self._shared.free[self.rank], 1)
        return data

    def _exchange(self, part: np.ndarray) -> list[np.ndarray]:
        """Write this rank's part and return the parts of all ranks.

        Args:
            part: values of this rank, at most a piece.

        Returns:
            Views of shared memory, which the second call after this one overwrites.
        """
        self._turn ^= 1
        views = [piece[: part.nbytes].view(part.dtype) for piece in self._pieces[self._turn]]
        views[self.rank][...] = part
        self._meet()
        return views

    def _meet(self) -> None:
        """Wait until every rank has made this call."""
        arrived, others = self._shared.arrived, [r for r in range(self.size) if r != self.rank]
        self.check()
        for rank in others:
            os.eventfd_write(arrived[self.rank][rank], 1)
        for rank in others:
            self.wait_eventfd(arrived[rank][self.rank])

    def wait_eventfd(self, fd: int) -> None:
        """Wait for one signal of an eventfd and take it."""
        while True:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                self._polls[fd].poll(self._check_every_ms)
                self.check()
            else:
                return
