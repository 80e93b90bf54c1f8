"""A driver that takes notes, instead of CUDA's, and what it reports of its devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fd_dsa.triton_runtime import driver, register_device_api, unfreeze
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor


@pytest.fixture
def api() -> FakeApi:
    """What the launcher asks about fake tensors."""
    api = FakeApi()
    register_device_api(FakeTensor, api)
    return api


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, api: FakeApi) -> Iterator[FakeLibrary]:
    """The driver library of one test; it reads the arguments of `scale_kernel`."""
    library = FakeLibrary(codes="QQif?i")
    monkeypatch.setattr(driver, "_open_library", lambda: library)
    driver.cuda.cache_clear()
    yield library
    unfreeze()
    driver.cuda.cache_clear()
