"""Matrices in four bits: NVFP4, and INT4 with a scale and a zero point for each group.

A checkpoint stores such a matrix as several tensors. Their names and shapes differ between the
programs that write them.

Source: exports of NVIDIA ModelOpt 0.47, llm-compressor 0.14, AutoRound 0.16 and GPTQModel 7.7, and
the loaders of vLLM and SGLang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fd_dsa.errors import CheckpointError, shorten
from fd_dsa.models.dequantize import (
    FLOAT_DTYPES,
    FP8,
    SCALE_SUFFIX,
    TensorInfo,
    dequantize_groups,
    dequantize_int4,
    to_float32,
)
from fd_dsa.ops.fp8 import decode_e4m3

GLOBAL_SUFFIX, ZEROS_SUFFIX, GROUPS_SUFFIX = "_global", "_zeros", "_groups"
"""Ends of the names here of a matrix' global scale, zero points and group of each column."""
PART_SUFFIXES = SCALE_SUFFIX, GLOBAL_SUFFIX, ZEROS_SUFFIX, GROUPS_SUFFIX
UNUSED_LEAVES = ("input_scale", "input_global_scale", "k_scale", "v_scale", "weight_shape")
"""Last parts of the names of scales of activations and caches, and of a matrix' shape."""
# values of a word, and zero point of symmetric INT4
_WORD, _MIDDLE = 8, 8
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", FP8: "u1"}
PackedMatrix = tuple[np.ndarray, np.ndarray, np.ndarray | None, float]
"""Codes uint8 [out, in / 2], scales [out, groups] as stored (bfloat16 as bits), zero points uint8
[out, groups] or None for 8, and the factor of all scales."""
_Kinds = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Packing:
    """Layout of the matrices that a checkpoint stores in four bits.

    Attributes:
        title: format and program in messages.
        dtype: dtype of the codes: U8 = NVFP4, I8 = INT4 in bytes, I32 = INT4 in words of eight.
        leaves: name here of each last part of a stored name that differs.
        group_size: values of a row with one scale; None = the whole row.
        transposed: INT4 tensors are [in, out], not [out, in].
        code_axis: axis of stored codes along which a word holds eight values.
        order: nibble of a word for each of its eight values.
        zero_offset: number that is added to stored zero points; None = there are none.
        symmetric: every zero point must be 8.
        has_groups: the group of each column must be stored.
        divides: values are divided by the global scale, not multiplied.
    """

    title: str
    dtype: str
    leaves: Mapping[str, str] = field(default_factory=dict)
    group_size: int | None = 16
    transposed: bool = False
    code_axis: int = 1
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    zero_offset: int | None = None
    symmetric: bool = False
    has_groups: bool = False
    divides: bool = False

    def name_of(self, stored: str) -> str:
        """Return the name here of a stored tensor."""
        prefix, dot, leaf = stored.rpartition(".")
        return f"{prefix}{dot}{self.leaves.get(leaf, leaf)}"

    def problems(
        self, name: str, shape: tuple[int, ...], info_of: Callable[[str], TensorInfo | None]
    ) -> Iterator[str]:
        """Yield a message for each tensor of a matrix that is missing or does not fit.

        Args:
            shape: [out, in] of the matrix.
            info_of: function from a name here to the stored tensor.
        """
        codes = info_of(name)
        assert codes is not None, name
        where, (rows, columns) = f"{codes.file}: {self.title}: tensor", shape
        across = _WORD if self.dtype == "I32" else math.lcm(2, self.group_size or 2)
        if self.transposed and self.code_axis == 1:
            across = 1
        down = _WORD if across == 1 or self.zero_offset is not None else 1
        if rows % down or columns % across:
            allowed = f"[out, in] with multiples of {down} and {across}"
            yield f"{where} {shorten(codes.name)}: got {list(shape)}, allowed: {allowed}"
            return
        zeros = info_of(name + ZEROS_SUFFIX)
        if zeros is not None and self.zero_offset is None:
            yield f"{where} {zeros.name!r}: unexpected, config.json says symmetric weights"
        for end, (dtypes, expected) in self._parts(rows, columns).items():
            wanted, info = f"{' or '.join(dtypes)} {list(expected)}", info_of(name + end)
            if info is None:
                leaf = (name + end).rpartition(".")[2]
                stored = next((s for s, here in self.leaves.items() if here == leaf), leaf)
                if end != GROUPS_SUFFIX or self.has_groups:
                    missing = f"{codes.name.rpartition('.')[0]}.{stored}"
                    yield f"{where} {missing!r} is missing, expected {wanted}"
            # the global scale is a scalar, or has one element
            elif info.dtype not in dtypes or info.shape not in (expected, expected or (1,)):
                found = f"{info.dtype} {list(info.shape)}"
                yield f"{where} {shorten(info.name)}: expected {wanted}, found {found}"

    def _parts(self, rows: int, columns: int) -> _Kinds:
        """Return dtypes and shape of each tensor of a matrix, by the end of its name here."""
        groups = -(-columns // (self.group_size or columns))
        codes, scales, zeros = [rows, columns], (rows, groups), (rows // _WORD, groups)
        if self.transposed:
            codes, scales, zeros = [columns, rows], (groups, rows), (groups, rows // _WORD)
        codes[self.code_axis] //= _WORD if self.dtype == "I32" else 2
        found: _Kinds = {
            "": ((self.dtype,), tuple(codes)),
            SCALE_SUFFIX: ((FP8,) if self.dtype == "U8" else FLOAT_DTYPES, scales),
        }
        if self.dtype == "U8":
            found[GLOBAL_SUFFIX] = ("F32",), ()
        if self.zero_offset is not None:
            found[ZEROS_SUFFIX] = ("I32",), zeros
        return found | {GROUPS_SUFFIX: (("I32",), (columns,))}

    def unpack(self, parts: Mapping[str, tuple[TensorInfo, np.ndarray]]) -> np.ndarray:
        """Return a matrix float32 [out, in].

        Args:
            parts: tensors of the matrix and their bytes, by the end of their name here.

        Raises:
            CheckpointError: a scale is no number, a zero point or a group is out of range.
        """
        info, raw = parts[""]
        scales = finite_numbers(*parts[SCALE_SUFFIX])
        if self.dtype == "U8":
            factor = finite_numbers(*parts[GLOBAL_SUFFIX], above_zero=self.divides).reshape(())
            scales = scales / factor if self.divides else scales * factor
            return dequantize_groups(raw.reshape(info.shape), scales)
        if self.dtype == "I8":
            # two's complement becomes 0 to 15
            codes = _nibbles(raw.reshape(info.shape)) ^ np.uint8(_MIDDLE)
        else:
            codes = self._words(info, raw, self.code_axis)
        scales = np.ascontiguousarray(scales.T) if self.transposed else scales
        zeros = self._zeros(parts)
        if zeros is None:
            zeros = np.full(scales.shape, _MIDDLE, np.float32)
        groups = np.arange(codes.shape[1]) // (self.group_size or codes.shape[1])
        if GROUPS_SUFFIX in parts:
            info, raw = parts[GROUPS_SUFFIX]
            groups, last = raw.view("<i4"), scales.shape[1] - 1
            _refuse(info, groups, (groups < 0) | (groups > last), f"groups 0 to {last}")
        return dequantize_int4(codes, zeros, scales, groups)

    def repack(self, parts: Mapping[str, tuple[TensorInfo, np.ndarray]]) -> PackedMatrix:
        """Return a matrix in four bits, two neighbours of a row in a byte, the first one low.

        Args:
            parts: as for `unpack`.

        Raises:
            CheckpointError: as for `unpack`, and for columns whose groups are no neighbours.
        """
        (info, raw), (scale_info, scale_raw) = parts[""], parts[SCALE_SUFFIX]
        # for the check of the numbers
        finite_numbers(scale_info, scale_raw)
        scales = scale_raw.view(_STORED[scale_info.dtype]).reshape(scale_info.shape)
        scales = scales.T if self.transposed else scales
        codes = raw.reshape(*info.shape, -1)
        if self.dtype == "U8":
            numbers = finite_numbers(*parts[GLOBAL_SUFFIX], above_zero=self.divides)
            factor = float(numbers.reshape(()))
            return codes[..., 0], scales, None, 1 / factor if self.divides else factor
        if self.dtype == "I8":
            # two's complement becomes 0 to 15
            return codes[..., 0] ^ np.uint8(_MIDDLE << 4 | _MIDDLE), scales, None, 1.0
        if self.transposed and self.code_axis == 1:
            values = self._words(info, raw, 1)
            codes = values[:, ::2] | values[:, 1::2] << np.uint8(4)
        else:
            codes = codes.transpose(1, 0, 2) if self.transposed else codes
            codes = codes.reshape(len(codes), -1)
        if GROUPS_SUFFIX in parts:
            info, raw = parts[GROUPS_SUFFIX]
            groups, size = raw.view("<i4"), self.group_size or 2 * codes.shape[1]
            rule = "groups of neighbours without desc_act in config.json"
            _refuse(info, groups, groups != np.arange(len(groups)) // size, rule)
        zeros = self._zeros(parts)
        zeros = None if zeros is None or self.symmetric else zeros.astype(np.uint8)
        return codes, scales, zeros, 1.0

    def _zeros(self, parts: Mapping[str, tuple[TensorInfo, np.ndarray]]) -> np.ndarray | None:
        """Return stored zero points as float32 [out, groups], None without any."""
        if self.zero_offset is None:
            return None
        # words hold eight rows of the matrix
        info, raw = parts[ZEROS_SUFFIX]
        zeros = self._words(info, raw, int(self.transposed)).astype(np.float32)
        zeros += self.zero_offset
        _refuse(info, zeros, zeros > 15, "zero points up to 15")
        rule = f"{_MIDDLE}, the zero point of symmetric weights (config.json)"
        _refuse(info, zeros, (zeros != _MIDDLE) & self.symmetric, rule)
        return zeros

    def _words(self, info: TensorInfo, raw: np.ndarray, axis: int) -> np.ndarray:
        """Return the values of words of eight, uint8, with rows of the matrix first.

        Args:
            axis: axis of the stored tensor along which a word holds eight values.
        """
        values = _nibbles(raw.reshape(*info.shape, 4))[..., self.order]
        rows, columns = info.shape
        if axis == 1:
            values = values.reshape(rows, columns * _WORD)
        else:
            values = values.transpose(0, 2, 1).reshape(rows * _WORD, columns)
        return np.ascontiguousarray(values.T) if self.transposed else values


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Return the two values of each byte, uint8 [..., 2 * n], the low bits first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def finite_numbers(info: TensorInfo, raw: np.ndarray, *, above_zero: bool = False) -> np.ndarray:
    """Return a tensor as float32 in the stored shape.

    Args:
        above_zero: True refuses numbers of at most 0, too.

    Raises:
        CheckpointError: a number is NaN or infinite. The message has its place.
    """
    values = decode_e4m3(raw.reshape(info.shape)) if info.dtype == FP8 else to_float32(raw, info)
    rule = "finite numbers" + " above 0" * above_zero
    _refuse(info, values, ~np.isfinite(values) | ((values <= 0) & above_zero), rule)
    return values


def _refuse(info: TensorInfo, values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    """Refuse a tensor with a wrong value."""
    if (found := np.flatnonzero(wrong)).size:
        place = [int(i) for i in np.unravel_index(found[0], values.shape)]
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r}: got {values.flat[found[0]]:g} at {place}, "
            f"allowed: {rule}; fetch the file again, or quantise the model again"
        )


_SCALES, _GLOBAL, _ZEROS, _GROUPS = (f"weight{end}" for end in PART_SUFFIXES)
_GPTQ = {"qweight": "weight", "scales": _SCALES, "qzeros": _ZEROS, "g_idx": _GROUPS}
_COMPRESSED = {"weight_packed": "weight", "weight_scale": _SCALES}
MODELOPT = Packing("NVFP4 (modelopt)", "U8", {"weight_scale": _SCALES, "weight_scale_2": _GLOBAL})
"""NVFP4 of ModelOpt."""
COMPRESSED_NVFP4 = Packing(
    "NVFP4 (compressed-tensors)", "U8", _COMPRESSED | {"weight_global_scale": _GLOBAL}, divides=True
)
"""NVFP4 of compressed-tensors."""
COMPRESSED_INT4 = Packing(
    "INT4 (compressed-tensors)", "I32", _COMPRESSED | {"weight_zero_point": _ZEROS}
)
"""INT4 of compressed-tensors."""
W4AFP8 = Packing("INT4 (w4afp8)", "I8")
"""INT4 experts of SGLang's W4AFP8."""
GPTQ = Packing("INT4 (gptq)", "I32", _GPTQ, transposed=True, code_axis=0, zero_offset=0)
"""GPTQ, with zero points as in its version 2."""
AWQ = Packing(
    *("INT4 (awq)", "I32", _GPTQ),
    transposed=True,
    order=(0, 4, 1, 5, 2, 6, 3, 7),
    zero_offset=0,
)
"""AWQ in the layout of its `gemm` version."""
