"""FastDeploy's operator for positions, in the form of #7367, and its kernel through the C ABI."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa import custom_ops
from tests.custom_ops.position_rows import MANY, Rows, expected, lengths_of
from tests.kernel_memory import KernelMemory

KERNELS = "position_ids"
POINTER, INT = ctypes.c_void_p, ctypes.c_int32
EXAMPLES = settings(
    max_examples=min(60, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# idle, first chunk, later chunk (both lengths above 0), decode, drafts
KINDS = st.sampled_from([(0, 0), (1, 0), (1, 1), (0, 1)])
ROWS = st.lists(st.tuples(KINDS, st.integers(0, 70), st.integers(0, 9)), min_size=1, max_size=60)


def check_operator(ops: Any, rows: Rows, extra: int) -> None:
    """Positions of a step, in a tensor that is longer."""
    import paddle

    size = sum(new for _, _, new in rows) + extra
    positions = paddle.full([size], -91, dtype="int32")
    tensors = [paddle.to_tensor(lengths) for lengths in lengths_of(rows)]
    found = ops.get_position_ids_and_mask_encoder_batch(*tensors, positions)
    np.testing.assert_array_equal(positions.numpy(), expected(rows, size))
    assert found.data_ptr() == positions.data_ptr()


@EXAMPLES
@given(drawn=ROWS, extra=st.integers(0, 300))
def test_any_step_equals_the_oracle(ops: Any, drawn: Any, extra: int) -> None:
    rows = [
        (new if prefill else 0, cached if has_cache else 0, new)
        for (prefill, has_cache), cached, new in drawn
    ]
    check_operator(ops, rows, extra)


@pytest.mark.parametrize("name", MANY)
def test_many_rows_and_tokens(ops: Any, name: str) -> None:
    check_operator(ops, MANY[name], 5)


def test_what_is_refused_is_named(ops: Any) -> None:
    import paddle

    tensors = [paddle.to_tensor(lengths) for lengths in lengths_of([(0, 3, 1), (2, 1, 2)])]
    positions = paddle.full([3], -91, dtype="int32")
    op = ops.get_position_ids_and_mask_encoder_batch
    with pytest.raises(OSError, match=r"seq_lens_decoder: got shape \[1\], .*shape \[2\]"):
        op(tensors[0], tensors[1][:1], tensors[2], positions)
    with pytest.raises(OSError, match="position_ids: got dtype int64, allowed is int32"):
        op(*tensors, positions.astype("int64"))
    with pytest.raises(OSError, match="seq_lens_this_time: got dtype float32"):
        op(*tensors[:2], tensors[2].astype("float32"), positions)
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5 were given"):
        op(*tensors, positions, positions)
    assert (positions == -91).all()


# ---- the kernel: on a GPU, and emulated on the CPU


def launch(*arguments: Any) -> None:
    """Call the launcher on the default stream."""
    function = custom_ops.build().kernels.fd_dsa_position_ids_cuda
    function.argtypes = (POINTER, POINTER, POINTER, INT, INT, POINTER)
    assert function(*arguments, None) == 0


@pytest.mark.parametrize("name", MANY)
def test_the_kernel_gives_the_same(kernel_memory: KernelMemory, name: str) -> None:
    m, rows = kernel_memory, MANY[name]
    total = sum(new for _, _, new in rows)
    _, cached, new = (m.put(lengths) for lengths in lengths_of(rows))
    # two tokens too few, and more than there are
    for size in (max(total - 2, 0), total + 700):
        positions = m.put(np.full(size + 256, -91, np.int32))
        pointers = [tensor.data_ptr() for tensor in (cached, new, positions)]
        for _ in range(3 if m.on_gpu else 1):
            launch(*pointers, len(rows), size)
        found = m.get(positions)
        np.testing.assert_array_equal(found[:size], expected(rows, size))
        assert (found[size:] == -91).all()


def test_lengths_that_no_step_has_stay_inside(kernel_memory: KernelMemory) -> None:
    m, rng = kernel_memory, np.random.default_rng(2)
    extremes = np.array([-(2**31), -1, 0, 1, 40, 2**30, 2**31 - 1], np.int32)
    for num_rows in (1, 9, 300, 1500):
        positions = m.put(np.full(600, -91, np.int32))
        cached, new = (m.put(rng.choice(extremes, num_rows)) for _ in range(2))
        pointers = cached.data_ptr(), new.data_ptr(), positions.data_ptr() + 400
        launch(*pointers, num_rows, 400)
        found = m.get(positions)
        assert (found[:100] == -91).all() and (found[500:] == -91).all()
