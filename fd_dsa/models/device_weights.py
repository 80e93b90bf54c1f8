"""Weights of a model in the memory of a device, in the dtypes of the checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod

import numpy as np

from fd_dsa.attention.head_exchange import exchanges_heads
from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import Upload
from fd_dsa.distributed import Group
from fd_dsa.models.dequantize import BLOCK, num_blocks
from fd_dsa.models.four_bits import FourBits
from fd_dsa.models.sources import RandomTensor, SourceTensor, WeightLoader
from fd_dsa.models.weights import checked_ids, halves_of_heads
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.device_matrix import DeviceMatrix, DeviceNorm, FourBitExperts, GroupedFp8
from fd_dsa.ops.fill_kernels import fill_codes, fill_constant, fill_random
from fd_dsa.tensor import FourBitWeight, Tensor

logger = logging.getLogger(__name__)
ExpertMatrix = DeviceMatrix | FourBitExperts
"""Weight of a grouped GEMM of experts."""
# dtype of held weights -> its name in the safetensors format
_STORED = {"float32": "F32", "bfloat16": "BF16"}
# beginning of the names of a layer's tensors, such as `model.layers.3.` and `mtp.0.`
_LAYER = re.compile(r"\D*\d+\.")


class DeviceWeights:
    """Weights on a device, filled from the file through page-locked memory.

    Weights of GEMMs are [out, in], as stored. A tensor of the held dtype is copied byte by byte.
    Others are converted on the host, one at a time. The methods are those of HostWeights.

    Args:
        dtype: dtype of activations and of weights that are not FP8, "bfloat16" or "float32".
        allocate: makes a tensor of a shape and dtype on the device.
        fp8: names of the tensors that the checkpoint stores as e4m3 with a scale per 128 x 128.
        four_bits: experts that are held in four bits; None = there are none.
        round_scales: True if scales of the model's activations are powers of two.
    """

    are_on_device = True

    def __init__(
        self,
        dtype: str,
        allocate: Allocate,
        fp8: Collection[str] = frozenset(),
        *,
        round_scales: bool = False,
        group: Group | None = None,
        four_bits: FourBits | None = None,
    ) -> None:
        self.group, self._four_bits = group, four_bits
        self.loaders: dict[str, WeightLoader] = {}
        self._dtype, self._allocate, self.fp8 = dtype, allocate, fp8
        self._fp8_layers = {_layer_of(name) for name in fp8}
        self._round_scales = round_scales
        self._upload: Upload | None = None
        # weights of the heads of all ranks, of which this rank loads its own
        self._whole: list[Tensor] = []

    def bias(self, parts: Mapping[str, int]) -> Tensor:
        """Return a `vector` in the dtype of activations."""
        return self.vector(parts, self._dtype)

    def vector(self, parts: Mapping[str, int], dtype: str = "float32") -> Tensor:
        """Return vectors end to end, in any dtype."""
        vector, start = self._allocate((sum(parts.values()),), dtype), 0
        for name, length in parts.items():
            self._fills(name, vector, start, length)
            start += length
        return vector

    def norm(self, name: str, width: int, epsilon: float) -> DeviceNorm:
        """Return an RMSNorm with a weight, which rounds its scales if its layer is FP8."""
        return DeviceNorm(self.vector({name: width}), epsilon, self.scales_after(name))

    def scales_after(self, name: str) -> bool | None:
        """Return `round_scales` of FP8 weights that read a norm, None if its layer has none."""
        # the MTP layer may be the only one in FP8
        return self._round_scales if _layer_of(name) in self._fp8_layers else None

    def table(self, name: str, rows: int, width: int) -> tuple[Tensor, DeviceMatrix]:
        """Return the embedding [rows, width], and its memory as the weight of a head."""
        values = self._allocate((rows, width), self._dtype)
        self._fills(name, values, 0, rows * width)
        return values, DeviceMatrix(values, sums_in_float32=True)

    def matrix(
        self,
        in_width: int,
        parts: Mapping[str, int],
        *,
        sums_in_float32: bool = False,
    ) -> DeviceMatrix:
        """Return the weight of a GEMM, in FP8 if all parts are FP8 and begin at a block."""
        shape, row = (sum(parts.values()), in_width), 0
        weight = self._weight(shape, self._are_blocks(parts), sums_in_float32=sums_in_float32)
        for name, width in parts.items():
            self._fills_rows(name, weight, row, width)
            row += width
        return weight

    def columns(
        self, in_width: int, parts: Mapping[str, int], factors: Mapping[str, float]
    ) -> tuple[Tensor, ...]:
        """Return the parts of a weight as [in, out] each, times their factors."""
        made = []
        for name, width in parts.items():
            target = self._allocate((in_width, width), self._dtype)
            self._fills(name, target, 0, in_width * width, factors.get(name, 1.0), transpose=True)
            made.append(target)
        return tuple(made)

    def by_head(
        self, name: str, heads: int, key_width: int, value_width: int, rank: int
    ) -> tuple[DeviceMatrix, DeviceMatrix]:
        """Return both halves of each head of kv_b_proj, which cross FP8 blocks."""
        shapes = (heads, key_width, rank), (heads, rank, value_width)
        halves = tuple(self._matrix_of_heads(shape) for shape in shapes)
        keys, values = (half.values for half in halves)

        def load(source: SourceTensor) -> None:
            if isinstance(source, RandomTensor):
                self._draw(source, keys, 0, prod(keys.shape))
                self._draw(source, values, 0, prod(values.shape))
                return
            parts = halves_of_heads(source, heads, key_width, rank)
            for target, part in zip((keys, values), parts, strict=True):
                self._put(target, 0, part)

        self.loaders[name] = load
        return halves[0], halves[1]

    def _matrix_of_heads(self, shape: tuple[int, ...]) -> DeviceMatrix:
        """Return a weight of the heads of this rank, within that of all ranks if they need it."""
        group = self.group
        if group is None or not exchanges_heads(group):
            return DeviceMatrix(self._allocate(shape, self._dtype))
        heads, *others = shape
        whole = self._allocate((group.size * heads, *others), self._dtype)
        self._whole.append(whole)
        first = group.rank * heads
        return DeviceMatrix(whole[first : first + heads], whole=DeviceMatrix(whole))

    def grouped(
        self, name: str, groups: int, in_width: int, out_width: int
    ) -> DeviceMatrix | GroupedFp8:
        """Return the weight [groups, in_width, out_width] of a GEMM per group, or its FP8 form."""
        if name in self.fp8:
            rows = groups * out_width
            weight = self._weight((rows, in_width), is_fp8=True)
            self._fills_rows(name, weight, 0, rows)
            assert weight.scales is not None
            return GroupedFp8(weight.values, weight.scales, self._round_scales)
        target = self._allocate((groups, in_width, out_width), self._dtype)

        def load(source: SourceTensor) -> None:
            if isinstance(source, RandomTensor):
                self._draw(source, target, 0, prod(target.shape))
            else:
                stored = source.float32().reshape(groups, out_width, in_width)
                self._put(target, 0, stored.transpose(0, 2, 1))

        self.loaders[name] = load
        return DeviceMatrix(target)

    def ids(self, name: str, rows: int, width: int, below: int) -> Tensor:
        """Return a table of ids from 0 to below `below`, int32 [rows, width], rows ascending."""
        table = self._allocate((rows, width), "int32")

        def load(source: SourceTensor) -> None:
            ids = np.sort(checked_ids(name, source, below), axis=1)
            self._copy(table, 0, ids.astype(np.int32))

        self.loaders[name] = load
        return table

    def experts(
        self,
        prefix: str,
        count: int,
        hidden_size: int,
        width: int,
        names_of_parts: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> tuple[ExpertMatrix, ExpertMatrix]:
        """Return gate_up [count, 2 * width, hidden] and down [count, hidden, width]."""
        names = {
            (i, part): f"{prefix}{i}.{name}.weight"
            for i in range(count)
            for part, name in zip(("gate", "up", "down"), names_of_parts, strict=True)
        }
        if self._four_bits is not None and self._four_bits.names.issuperset(names.values()):
            return self._four_bit_experts(self._four_bits, names, count, hidden_size, width)
        is_fp8 = width % BLOCK == 0 and self._are_blocks(dict.fromkeys(names.values(), BLOCK))
        shapes = (2 * width, hidden_size), (hidden_size, width)
        gate_up, down = (self._weight((count, *shape), is_fp8) for shape in shapes)
        for (i, part), name in names.items():
            rows = hidden_size if part == "down" else width
            first = width if part == "up" else 0
            self._fills_rows(name, down if part == "down" else gate_up, first, rows, matrix=i)
        return gate_up, down

    def _four_bit_experts(
        self,
        form: FourBits,
        names: Mapping[tuple[int, str], str],
        count: int,
        hidden_size: int,
        width: int,
    ) -> tuple[FourBitExperts, FourBitExperts]:
        """Return the weights of `experts` in four bits.

        Args:
            names: names of the matrices by expert and part.
        """

        def new(parts: int, columns: int, values: int) -> FourBitWeight:
            codes, scales = form.shapes(columns, values)
            outer = count, parts
            return FourBitWeight(
                codes=self._allocate((*outer, *codes), "uint8"),
                scales=self._allocate((*outer, *scales), form.scale_dtype),
                factors=None if form.kind == "int4" else self._allocate(outer, "float32"),
                group=form.group,
                kind=form.kind,
                width=values,
                peaks=self._allocate((*outer, columns), "uint8") if form.has_peaks else None,
            )

        gate_up, down = new(2, width, hidden_size), new(1, hidden_size, width)
        for (i, part), name in names.items():
            if part == "down":
                self._fills_four_bits(name, form, down, i)
            else:
                self._fills_four_bits(name, form, gate_up, 2 * i + (part == "up"))
        return FourBitExperts(gate_up), FourBitExperts(down)

    def _fills_four_bits(
        self, name: str, form: FourBits, weight: FourBitWeight, matrix: int
    ) -> None:
        """Register a loader that fills one matrix, counted over all experts and parts."""

        def load(source: SourceTensor) -> None:
            if isinstance(source, RandomTensor):
                count = prod(weight.codes.shape[2:])
                fill_codes(weight.codes, matrix * count, count, source.seed, form.kind)
            tensors = weight.codes, weight.scales, weight.factors, weight.peaks
            for target, array in zip(tensors, form.arrays(source), strict=True):
                if array is not None:
                    self._copy(target, matrix * array.size, array)

        self.loaders[name] = load

    def constant(self, make: Callable[[], np.ndarray]) -> Tensor:
        """Return a table of float32 that is computed and not loaded."""
        array = make()
        target = self._allocate(array.shape, "float32")
        self._put(target, 0, array)
        return target

    def finish(self) -> None:
        """Wait until all copies are complete, free the page-locked memory, and gather heads."""
        if self._upload is not None:
            self._upload.finish()
            self._upload = None
        while self.group is not None and self._whole:
            whole = self._whole.pop()
            heads = whole.shape[0] // self.group.size
            self.group.all_gather_rows(whole, range(0, whole.shape[0] + 1, heads))

    def _are_blocks(self, parts: Mapping[str, int]) -> bool:
        """Return True if one weight can hold the parts as FP8."""
        if not all(name in self.fp8 for name in parts):
            return False
        starts = np.cumsum(list(parts.values()))[:-1]
        if not (starts % BLOCK).any():
            return True
        logger.info(
            "%s: held in %s, as FP8 parts of one GEMM must begin at multiples of %d rows, found %s",
            *(", ".join(parts), self._dtype, BLOCK, starts.tolist()),
        )
        return False

    def _weight(
        self, shape: tuple[int, ...], is_fp8: bool, *, sums_in_float32: bool = False
    ) -> DeviceMatrix:
        """Allocate a weight or a stack of weights, in FP8 also their scales."""
        if not is_fp8:
            return DeviceMatrix(self._allocate(shape, self._dtype), sums_in_float32=sums_in_float32)
        blocks = (*shape[:-2], *num_blocks(shape[-2:], (BLOCK, BLOCK)))
        parts = self._allocate(shape, "uint8"), self._allocate(blocks, "float32")
        return DeviceMatrix(*parts, round_scales=self._round_scales)

    def _fills_rows(
        self, name: str, weight: DeviceMatrix, row: int, rows: int, matrix: int = 0
    ) -> None:
        """Register a loader that fills rows of a weight, or of one matrix of a stack."""
        values, scales = weight.values, weight.scales
        out_width, width = values.shape[-2:]
        start, count = (matrix * out_width + row) * width, rows * width
        if scales is None:
            self._fills(name, values, start, count)
            return
        strips, groups = scales.shape[-2:]
        first = (matrix * strips + row // BLOCK) * groups

        def load(source: SourceTensor) -> None:
            if isinstance(source, RandomTensor):
                fill_random(values, start, count, source.seed, 1.0)
                fill_constant(scales, first, -(-rows // BLOCK) * groups, source.deviation)
                return
            assert source.scale is not None, name
            self._copy(values, start, source.raw)
            self._copy(scales, first, source.scale.float32())

        self.loaders[name] = load

    def _fills(
        self,
        name: str,
        target: Tensor,
        start: int,
        count: int,
        factor: float = 1.0,
        *,
        transpose: bool = False,
    ) -> None:
        """Register a loader that fills `count` values of a weight from `start` on."""
        is_plain = factor == 1.0 and not transpose
        dtype = str(target.dtype).rpartition(".")[2]

        def load(source: SourceTensor) -> None:
            if isinstance(source, RandomTensor):
                self._draw(source, target, start, count, factor)
            elif is_plain and source.info.dtype == _STORED[dtype]:
                self._copy(target, start, source.raw)
            else:
                values = source.float32() * np.float32(factor)
                self._put(target, start, values.T if transpose else values)

        self.loaders[name] = load

    def _draw(
        self, source: RandomTensor, target: Tensor, start: int, count: int, factor: float = 1.0
    ) -> None:
        """Fill values with random numbers of a source."""
        if source.constant is not None:
            fill_constant(target, start, count, source.constant)
        else:
            fill_random(target, start, count, source.seed, source.deviation * factor)

    def _put(self, target: Tensor, start: int, array: np.ndarray) -> None:
        """Convert float32 values to the dtype of the target and copy them."""
        is_narrow = str(target.dtype).endswith("bfloat16")
        self._copy(target, start, bfloat16_bits(array) if is_narrow else array)

    def _copy(self, target: Tensor, start: int, array: np.ndarray) -> None:
        """Enqueue a copy of values in the dtype of the target."""
        if self._upload is None:
            self._upload = Upload(target)
        self._upload.copy(target, start, np.ascontiguousarray(array))


def _layer_of(name: str) -> str:
    """Return the prefix that tensors of one layer share, the whole name of other tensors."""
    found = _LAYER.match(name)
    return found[0] if found else name
