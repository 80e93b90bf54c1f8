"""A small case of every operator, and whether a provider's result agrees with the definition.

The definitions are written again here, in float64 and without the package's arithmetic. A kernel
of fd_dsa_ops serves after it has passed its case; `fd-dsa doctor` runs those of all providers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fd_dsa.ops._host import dtype_name
from fd_dsa.step import StepMetadataBuilder
from fd_dsa.step.builder import Allocate
from fd_dsa.step.host_tensor import as_tensor

Outputs = dict[str, np.ndarray]
Call = Callable[..., Any]

UNTOUCHED = 0xA5
"""Every byte of the memory that a case lets an operator fill."""


class CheckFailed(Exception):
    """An operator's result is not that of its definition."""


def require(condition: Any, message: str) -> None:
    """Raise CheckFailed unless all of `condition` holds."""
    if not np.all(condition):
        raise CheckFailed(message)


class Memory:
    """Where the arrays of a case are.

    Args:
        allocate: makes a tensor of a shape and dtype on a device; None = NumPy's memory.
    """

    def __init__(self, allocate: Allocate | None = None) -> None:
        self.allocate = allocate

    @property
    def on_host(self) -> bool:
        """Whether arrays are NumPy's."""
        return self.allocate is None

    def put(self, array: np.ndarray, dtype: str = "") -> Any:
        """A copy of an array; on a device as another dtype of the same width."""
        if self.allocate is None:
            return array.copy()
        # kernels and their launcher are loaded only where there is a device
        from fd_dsa.triton_runtime.transfers import uploaded

        return uploaded(self.allocate, array, dtype)

    def get(self, array: Any) -> np.ndarray:
        """The values of what `put` made or an operator returned."""
        if isinstance(array, np.ndarray):
            return array
        if self.allocate is None:
            return np.asarray(array.numpy())
        from fd_dsa.triton_runtime.transfers import on_host

        return on_host(array, np.empty(tuple(array.shape), dtype_name(array.dtype)))

    def blank(self, shape: tuple[int, ...], dtype: type) -> Any:
        """Memory whose every byte is UNTOUCHED."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.put(np.full(size, UNTOUCHED, np.uint8).view(dtype).reshape(shape))

    def step(
        self, lengths: tuple[list[int], ...], tables: np.ndarray, block: int, tokens: int
    ) -> Any:
        """ForwardMeta of encoder, decoder and new lengths, padded to a number of tokens."""
        arrays = [np.array(values, np.int32) for values in lengths]
        device = "numpy" if self.on_host else "gpu"
        builder = StepMetadataBuilder(
            len(tables), tokens, tables.shape[1], block, tables.size, device, self.allocate
        )
        return builder.build(*arrays, tables, tokens)


@dataclass(frozen=True, slots=True)
class Case:
    """A small case of an operator.

    Attributes:
        run: the results of a provider's function, and the inputs that the definition needs.
        check: raises CheckFailed unless they agree with the definition.
        same_bytes: on a device every output has the CPU's bytes.
    """

    run: Callable[[Call, Memory], Outputs]
    check: Callable[[Outputs], None]
    same_bytes: bool = True

    def difference(self, call: Call, memory: Memory) -> str:
        """How the result of a function differs from the definition; "" if it does not."""
        try:
            self.check(self.run(call, memory))
        except CheckFailed as failure:
            return str(failure)
        return ""


# a prompt after a cached prefix, a decode row, an idle one
_LENGTHS = [3, 0, 0], [2, 4, 0], [3, 1, 0]
_POSITION_IDS = [2, 3, 4, 4]


def _step_metadata(call: Call, memory: Memory) -> Outputs:
    """`call` is StepMetadataBuilder, whatever the provider."""
    tables = np.random.default_rng(1).permutation(12).astype(np.int32).reshape(3, 4)
    meta = memory.step(_LENGTHS, tables, 2, 4)
    names = ("batch_id_per_token", "position_ids", "slot_mapping", "cu_seqlens_q", "cache_seqlens")
    names += ("cu_seqlens_kg", "indexer_attn_mask_offsets")
    return {"tables": tables} | {name: memory.get(getattr(meta, name)) for name in names}


def _check_step_metadata(out: Outputs) -> None:
    """The numbers of that step, worked by hand."""
    expected = {
        "batch_id_per_token": [0, 0, 0, 1],
        "position_ids": _POSITION_IDS,
        "cu_seqlens_q": [0, 3, 4, 4],
        "cache_seqlens": [0, 5, 0],
        "cu_seqlens_kg": [0, 5, 6, 6],
        "indexer_attn_mask_offsets": [0, 3, 0, 4, 0, 5, 0, 0],
    }
    for name, values in expected.items():
        require(out[name].tolist() == values, f"{name} is {out[name].tolist()}, not {values}")
    rows = expected["batch_id_per_token"]
    tables = out["tables"]
    slots = [2 * tables[b, p // 2] + p % 2 for b, p in zip(rows, _POSITION_IDS, strict=True)]
    require(out["slot_mapping"] == slots, f"slot_mapping is {out['slot_mapping']}, not {slots}")


def _position_ids(call: Call, memory: Memory) -> Outputs:
    positions = memory.put(np.full(6, -7, np.int32))
    call(*(memory.put(np.array(values, np.int32)) for values in _LENGTHS), positions)
    return {"positions": memory.get(positions)}


def _check_position_ids(out: Outputs) -> None:
    """Positions of that step, and nothing written after them."""
    expected, positions = [*_POSITION_IDS, -7, -7], out["positions"].tolist()
    require(positions == expected, f"positions are {positions}, not {expected}")


def _indexer_projection(call: Call, memory: Memory) -> Outputs:
    """Three tokens of 320 values, to keys of 128 and weights of four heads."""
    rng = np.random.default_rng(8)
    shapes = {"hidden": (3, 320), "wk": (320, 128), "weights_proj": (320, 4)}
    inputs = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    hidden, *parameters = (memory.put(array) for array in inputs.values())
    if memory.on_host:
        # parameters are Paddle's on a CPU, too
        parameters = [as_tensor(array) for array in parameters]
    out = (memory.blank((3, 128), np.float32), memory.blank((3, 4), np.float32))
    call(hidden, *parameters, out)
    return inputs | {"keys": memory.get(out[0]), "weights": memory.get(out[1])}


def _check_indexer_projection(out: Outputs) -> None:
    """Both products are within the rounding of a float32 sum."""
    hidden = out["hidden"].astype(np.float64)
    for name, weight in (("keys", out["wk"]), ("weights", out["weights_proj"])):
        expected, size = hidden @ weight, abs(hidden) @ abs(weight)
        worst = (abs(out[name] - expected) / size).max()
        require(worst <= 2.0**-18, f"{name} are off by {worst} of the sum of their terms")


def _topk(sizes: tuple[tuple[int, int], ...], call: Call, memory: Memory) -> Outputs:
    """Rows with all, k, no and many keys: a plateau, both signs and numbers below the normal ones.

    Args:
        sizes: widths of the scores, and k.
    """
    rng = np.random.default_rng(0)
    out: Outputs = {"widths": np.array([width for width, _ in sizes])}
    for width, k in sizes:
        positions = np.array([width - 1, k - 1, 0, width // 2 + k], np.int64)
        rows = np.array([0, 1, -1, 1], np.int32)
        tables = rng.permutation(2 * width // 8 + 2).astype(np.int32).reshape(2, -1)
        scores = rng.standard_normal((4, width)).astype(np.float32)
        scores[3] = np.maximum(np.round(scores[3]), 0)
        scores[0, ::7] *= np.float32(-1e-40)
        best = memory.blank((4, k), np.int32)
        inputs = map(memory.put, (scores, positions, rows, tables))
        call(*inputs, best, block_size=8, num_blocks=tables.size)
        lengths = np.where(rows < 0, 0, positions + 1)
        out |= {f"{width} best": memory.get(best), f"{width} scores": scores}
        out |= {f"{width} lengths": lengths, f"{width} tables": tables[np.maximum(rows, 0)]}
    return out


def _check_topk(out: Outputs) -> None:
    """A sort by score, then by position, gives the same slots in ascending position."""
    for width in out["widths"]:
        names = ("best", "scores", "lengths", "tables")
        for token, (best, scores, length, table) in enumerate(
            zip(*(out[f"{width} {name}"] for name in names), strict=True)
        ):
            chosen = np.sort(np.argsort(-scores[:length], kind="stable")[: len(best)])
            expected = np.full(len(best), -1)
            expected[: len(chosen)] = table[chosen // 8] * 8 + chosen % 8
            require(best == expected, f"row {token} of {width} is {best}, not {expected}")


def topk_case(*sizes: tuple[int, int]) -> Case:
    """Selections of k among so many scores."""
    return Case(partial(_topk, sizes), _check_topk)


STEP_CASES = {
    "step_metadata": Case(_step_metadata, _check_step_metadata),
    "position_ids": Case(_position_ids, _check_position_ids),
    "indexer_projection": Case(_indexer_projection, _check_indexer_projection, same_bytes=False),
    "topk": topk_case((40, 8), (9000, 7)),
}
