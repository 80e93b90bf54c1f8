"""Self-checks: a small case of every operator, compared with the operator's definition.

The definitions are written a second time here, in float64 and without the package's arithmetic.
Top-k and sparse MLA use a kernel of fd_dsa_ops only after it has passed its case. `fd-dsa doctor`
runs the cases of all providers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from fd_dsa.tensor import Array

Outputs = dict[str, np.ndarray]
Call = Callable[..., Any]

UNTOUCHED = 0xA5
"""Value of every byte of the memory that an operator fills in a case."""


class CheckFailed(Exception):
    """Error for a result that differs from the operator's definition."""


def require(condition: Any, message: str) -> None:
    """Raise CheckFailed unless all elements of `condition` are true."""
    if not np.all(condition):
        raise CheckFailed(message)


class Memory:
    """Memory of the arrays of a case.

    Args:
        allocate: allocator of tensors on a device; None = NumPy arrays.
    """

    def __init__(self, allocate: Allocate | None = None) -> None:
        self.allocate = allocate

    @property
    def on_host(self) -> bool:
        """True if the arrays are NumPy arrays."""
        return self.allocate is None

    def put(self, array: np.ndarray, dtype: str = "") -> Any:
        """Return a copy of an array.

        Args:
            array: values.
            dtype: dtype of the copy on a device, of the same width as the array's; "" = the same.
        """
        if self.allocate is None:
            return array.copy()
        # imported only if there is a device, because it loads the launcher of kernels
        from fd_dsa.device.transfers import uploaded

        return uploaded(self.allocate, array, dtype)

    def get(self, array: Array) -> np.ndarray:
        """Return the values of an array that `put` made or an operator returned."""
        if isinstance(array, np.ndarray):
            return array
        if self.allocate is None:
            return np.asarray(array.numpy())
        from fd_dsa.device.transfers import on_host

        return on_host(array, np.empty(tuple(array.shape), dtype_name(array.dtype)))

    def blank(self, shape: tuple[int, ...], dtype: type) -> Any:
        """Return an array whose bytes are all UNTOUCHED."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.put(np.full(size, UNTOUCHED, np.uint8).view(dtype).reshape(shape))

    def step(
        self, lengths: tuple[list[int], ...], tables: np.ndarray, block: int, tokens: int
    ) -> ForwardMeta:
        """Return the ForwardMeta of encoder, decoder and new lengths, padded to `tokens`."""
        encoder, decoder, new = (np.array(values, np.int32) for values in lengths)
        device = "numpy" if self.on_host else "gpu"
        builder = StepMetadataBuilder(
            len(tables), tokens, tables.shape[1], block, tables.size, device, self.allocate
        )
        return builder.build(encoder, decoder, new, tables, tokens)


@dataclass(frozen=True, slots=True)
class Case:
    """A small case of an operator.

    Attributes:
        run: calls a provider's function and yields its results. Its second part raises CheckFailed
            unless the results, which may have changed since, agree with the definition.
        same_bytes: True if every output on a device must have the CPU's bytes.
    """

    run: Callable[[Call, Memory], Iterator[Outputs]]
    same_bytes: bool = True

    def difference(self, call: Call, memory: Memory) -> str:
        """Return the difference of a function's result from the definition, or ""."""
        try:
            for _ in self.run(call, memory):
                pass
        except CheckFailed as failure:
            return str(failure)
        return ""


# a prompt after a cached prefix, a decode row, an idle row
_LENGTHS = [3, 0, 0], [2, 4, 0], [3, 1, 0]
_POSITION_IDS = [2, 3, 4, 4]


def _require_equal(out: Outputs, expected: dict[str, list[int]]) -> None:
    """Raise CheckFailed unless the outputs are the expected numbers."""
    for name, values in expected.items():
        got = out[name].tolist()
        require(got == values, f"{name}: got {got}, expected {values}")


def _step_metadata(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Compare the metadata of `_LENGTHS` with numbers made by hand. `call` is not used."""
    tables = np.random.default_rng(1).permutation(12).astype(np.int32).reshape(3, 4)
    rows = [0, 0, 0, 1]
    expected = {
        "batch_id_per_token": rows,
        "position_ids": _POSITION_IDS,
        "slot_mapping": [
            int(2 * tables[b, p // 2] + p % 2) for b, p in zip(rows, _POSITION_IDS, strict=True)
        ],
        "cu_seqlens_q": [0, 3, 4, 4],
        "cu_seqlens_kg": [0, 5, 6, 6],
        "indexer_attn_mask_offsets": [0, 3, 0, 4, 0, 5, 0, 0],
    }
    meta = memory.step(_LENGTHS, tables, 2, 4)
    out = {name: memory.get(getattr(meta, name)) for name in expected}
    yield out
    _require_equal(out, expected)


def _position_ids(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Compare the positions of `_LENGTHS`. Entries after them must keep their values."""
    positions = memory.put(np.full(6, -7, np.int32))
    call(*(memory.put(np.array(values, np.int32)) for values in _LENGTHS), positions)
    out = {"positions": memory.get(positions)}
    yield out
    _require_equal(out, {"positions": [*_POSITION_IDS, -7, -7]})


def _indexer_projection(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Project three tokens of 320 values to keys of 128 values and weights of four heads."""
    rng = np.random.default_rng(8)
    shapes = (3, 320), (320, 128), (320, 4)
    hidden, *weights = (rng.normal(0, 1, shape).astype(np.float32) for shape in shapes)
    # parameters are Paddle tensors on a CPU too
    parameters = map(as_tensor if memory.on_host else memory.put, weights)
    made = memory.blank((3, 128), np.float32), memory.blank((3, 4), np.float32)
    call(memory.put(hidden), *parameters, made)
    out = dict(zip(("keys", "weights"), map(memory.get, made), strict=True))
    yield out
    wide = hidden.astype(np.float64)
    for (name, found), weight in zip(out.items(), weights, strict=True):
        worst = (abs(found - wide @ weight) / (abs(wide) @ abs(weight))).max()
        require(worst <= 2.0**-18, f"{name} are off by {worst} of the sum of their terms")


def _topk(sizes: tuple[tuple[int, int], ...], call: Call, memory: Memory) -> Iterator[Outputs]:
    """Select from rows with all, k, no and many keys.

    The scores have a plateau, both signs and subnormal numbers. The expected slots are those of a
    sort by score, then by position, in ascending position.

    Args:
        sizes: pairs of a width of the scores, and k.
        call, memory: see `Case.run`.
    """
    rng = np.random.default_rng(0)
    out: Outputs = {}
    expected: Outputs = {}
    for width, k in sizes:
        positions = np.array([width - 1, k - 1, 0, width // 2 + k], np.int64)
        rows = np.array([0, 1, -1, 1], np.int32)
        tables = rng.permutation(2 * width // 8 + 2).astype(np.int32).reshape(2, -1)
        scores = rng.standard_normal((4, width)).astype(np.float32)
        scores[3] = np.maximum(np.round(scores[3]), 0)
        scores[0, ::7] *= np.float32(-1e-40)
        best = memory.blank((4, k), np.int32)
        inputs = [memory.put(array) for array in (scores, positions, rows, tables)]
        call(*inputs, best, block_size=8, num_blocks=tables.size)
        out[f"{width} best"], slots = memory.get(best), np.full((4, k), -1)
        for token, length in enumerate(np.where(rows < 0, 0, positions + 1)):
            chosen = np.sort(np.argsort(-scores[token, :length], kind="stable")[:k])
            slots[token, : len(chosen)] = tables[rows[token], chosen // 8] * 8 + chosen % 8
        expected[f"{width} best"] = slots
    yield out
    for name, slots in expected.items():
        for token, (best, right) in enumerate(zip(out[name], slots, strict=True)):
            require(best == right, f"row {token} of {name.split()[0]} is {best}, not {right}")


def topk_case(*sizes: tuple[int, int]) -> Case:
    """Make a case of selections.

    Args:
        sizes: pairs of a number of scores, and k.
    """
    return Case(partial(_topk, sizes))


STEP_CASES = {
    "step_metadata": Case(_step_metadata),
    "position_ids": Case(_position_ids),
    "indexer_projection": Case(_indexer_projection, same_bytes=False),
    "topk": topk_case((40, 8), (9000, 7)),
}
