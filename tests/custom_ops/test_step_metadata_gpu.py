"""The builder's tests on torch memory again, with steps by the kernel of custom_ops/."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fd_dsa import custom_ops
from tests.step import test_device, test_kernel, test_tail

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """The C library serves, and nothing else."""
    from custom_ops.build_library import build_library

    custom_ops.use_library(build_library())
    yield
    chosen = [(choice.operator, choice.serves) for choice in custom_ops.choices()]
    custom_ops.use_library(None)
    assert chosen == [("step_metadata", True)]


@pytest.mark.parametrize("name", test_kernel.SERVING)
def test_sizes_of_real_serving(name: str) -> None:
    test_kernel.test_sizes_of_real_serving(name)


def test_ten_thousand_launches_write_the_same_bytes() -> None:
    test_device.test_ten_thousand_launches_write_the_same_bytes()


def test_a_captured_step_follows_its_inputs() -> None:
    test_device.test_a_captured_step_follows_its_inputs()


def test_host_arrays_cannot_be_captured_and_do_not_end_the_capture() -> None:
    test_device.test_host_arrays_cannot_be_captured_and_do_not_end_the_capture()


def test_a_decode_step_neither_waits_nor_allocates_nor_compiles() -> None:
    test_device.test_a_decode_step_neither_waits_nor_allocates_nor_compiles()


@pytest.mark.parametrize("has_prefill", [False, True], ids=["decode", "prefill"])
def test_around_replays_of_graphs(has_prefill: bool) -> None:
    test_tail.test_around_replays_of_graphs(has_prefill)
