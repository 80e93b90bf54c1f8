"""NCCL is found, and its errors are plain."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from fd_dsa.distributed import nccl
from fd_dsa.errors import BackendUnavailable, DeviceError, DtypeError


def test_the_library_of_the_process_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = "7f 08:01 12 /usr/lib/libcuda.so.1\n7f 08:01 13 /opt/torch/libnccl.so.2\n"
    monkeypatch.setattr(nccl, "find_spec", lambda name: None)
    assert [*nccl.library_paths(maps)] == ["/opt/torch/libnccl.so.2", "libnccl.so.2"]


def test_without_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nccl, "library_paths", lambda maps: [str(tmp_path / "libnccl.so.2")])
    nccl.load_library.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"NCCL: found no .*pip install nvidia-nccl"):
        nccl.new_unique_id()


class Refuses:
    """A library whose calls fail."""

    def __init__(self) -> None:
        # functions, so that they take a `restype`
        self.ncclGetErrorString = lambda code: b"unhandled system error"
        self.ncclGetLastError = lambda handle: b" no eth0\n"
        self.ncclGetUniqueId = lambda place: 2


def test_an_error_has_the_text_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "load_library", Refuses)
    expected = "ncclGetUniqueId: NCCL error 2: unhandled system error; no eth0"
    with pytest.raises(DeviceError, match=expected):
        nccl.new_unique_id()


def test_a_type_that_nccl_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = object.__new__(nccl.Communicator)
    with pytest.raises(DtypeError, match="ncclAllReduce: got bool, allowed are uint8, int32"):
        communicator.all_reduce(0, 1, "bool", ctypes.c_void_p())
