"""GEMMs by cuBLASLt through ctypes: bfloat16 to float32, and FP8 with block scales on Hopper.

Paddle's `matmul` rounds results of bfloat16 operands to bfloat16 and knows no block scales.

cuBLASLt's matrices are column-major, so it reads a [rows, columns] tensor as its transpose. Here
out = x @ weight^T is computed as out^T = weight @ x^T: what it calls A is the weight, B is x.

Source: NVIDIA, cuBLAS documentation, "Using the cuBLASLt API"; scales as in "128-element 1D and
128x128 2D Block Scaling for FP8 Data Types".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import Transfers
from fd_dsa.errors import DeviceError, LaunchError, ShapeError
from fd_dsa.ops.arrays import check_array
from fd_dsa.ops.cublaslt_library import Functions, library
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import DeviceApi, api_for_type

_ALIGNMENT, _WORKSPACE_BYTES = 16, 32 << 20
# values along K that have one scale
_MOST_ALGORITHMS, _GROUP = 8, 128

# values of the enumerations in library_types.h, cublas_api.h and cublasLt.h
_FLOAT32, _BFLOAT16, _FP8 = 0, 14, 28
_COMPUTE_32F = 68
_TRANSPOSE_A, _A_SCALE_MODE, _B_SCALE_MODE = 3, 31, 32
# where scales of x, which is B, and of the weight are
_SCALES = 18, 17
_BLOCKS_OF_128, _VECTORS_OF_128 = 5, 4
_MAX_WORKSPACE, _REDUCTION_MASK, _MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# parts of a sum are stored in float32 and added by a step after them; the other schemes add in the
# order in which blocks finish, or round the parts to the type of the result
_REDUCE_IN_WORKSPACE = 2

_SET_OPERATION = "cublasLtMatmulDescSetAttribute"
_SET_PREFERENCE = "cublasLtMatmulPreferenceSetAttribute"
_POINTER_BYTES = ctypes.c_size_t(ctypes.sizeof(ctypes.c_void_p))
_FACTORS = ctypes.c_float(1), ctypes.c_float(0)
_ONE, _ZERO = map(ctypes.byref, _FACTORS)


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t; the algorithm is at its beginning."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def padded_rows(num_tokens: int) -> int:
    """Rows of the arrays of `Cublaslt.fp8_linear` for some tokens: a multiple of 4, at least 8."""
    return max(8, -(-num_tokens // 4) * 4)


class Gemm(NamedTuple):
    """What a plan is made for."""

    rows: int
    inputs: int
    outputs: int
    is_fp8: bool

    def __str__(self) -> str:
        kind = "block-scaled FP8" if self.is_fp8 else "bfloat16"
        return f"{kind} [{self.rows}, {self.inputs}] x [{self.outputs}, {self.inputs}]^T"


class _Plan(NamedTuple):
    """All arguments of cublasLtMatmul but the stream, for GEMMs of one shape.

    Attributes:
        gemm: the shape.
        places: addresses of weight, x, out, workspace, and scales of x and weight, which are
            written before each launch.
        pointers: what sets those of scales in cuBLASLt's description of the GEMM, which all plans
            of the same operands share; a launch reads it at once.
        arguments: with pointers to the places.
    """

    gemm: Gemm
    places: Sequence[ctypes.c_void_p]
    pointers: Sequence[tuple[Any, ...]]
    arguments: Sequence[Any]


class Cublaslt:
    """cuBLASLt on one device, by the C functions of its `library`; one thread at a time.

    The first GEMM of a shape makes its plan, and the first on a stream the stream's workspace of
    32 MiB. All others only launch, on the current stream of the tensors' library, and can be
    captured in a CUDA graph. Sums have a fixed order. Addresses are multiples of 16 bytes.

    A GEMM raises ShapeError, DtypeError or LaunchError for arguments that do not fit, DeviceError
    where cuBLASLt refuses, or a plan or workspace is missing inside a capture.
    """

    def __init__(
        self, api: DeviceApi, device: int, allocate: Allocate, library: ctypes.CDLL
    ) -> None:
        self._functions, self._device = Functions(library, device), device
        self._api, self._allocate, self._transfers = api, allocate, Transfers(api, device)
        self._set_pointer = getattr(library, _SET_OPERATION)
        self._operations: dict[bool, ctypes.c_void_p] = {}
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._workspaces: dict[int | None, Any] = {}
        self._handle = self._functions.made("cublasLtCreate")
        self._preference = self._functions.made("cublasLtMatmulPreferenceCreate")
        preferences = {
            _MAX_WORKSPACE: ctypes.c_uint64(_WORKSPACE_BYTES),
            _REDUCTION_MASK: ctypes.c_uint32(_REDUCE_IN_WORKSPACE),
            **{operand: ctypes.c_uint32(_ALIGNMENT) for operand in _MIN_ALIGNMENTS},
        }
        for attribute, value in preferences.items():
            self._functions.set(_SET_PREFERENCE, self._preference, attribute, value)

    def linear(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """out = x @ weight^T with float32 sums; all contiguous.

        Args:
            x: bfloat16 [rows, inputs].
            weight: bfloat16 [outputs, inputs].
            out: float32 [rows, outputs].
        """
        if x.shape[0]:
            self._run(x, weight, out)

    def fp8_linear(
        self, codes_x: Tensor, scales_x: Tensor, codes_w: Tensor, scales_w: Tensor, out: Tensor
    ) -> None:
        """out = x @ weight^T of FP8 e4m3 codes with a scale each 128 inputs, and float32 sums.

        cuBLASLt takes the number of rows for the step of `scales_x`, and has no such GEMM for
        fewer than 8. So the arrays of tokens have `padded_rows(num_tokens)` rows. Those past the
        tokens may hold anything, which changes the same rows of `out` alone. All are contiguous.

        Args:
            codes_x: uint8 [rows, inputs], inputs a multiple of 512.
            scales_x: float32 [inputs / 128, rows].
            codes_w: uint8 [outputs, inputs], outputs a multiple of 8.
            scales_w: float32 [ceil(outputs / 128), inputs / 128].
            out: bfloat16 [rows, outputs].
        """
        self._run(codes_x, codes_w, out, scales_x, scales_w)

    def _run(self, x: Tensor, weight: Tensor, out: Tensor, *scales: Tensor) -> None:
        """Queue a GEMM; scales of x and of the weight make it an FP8 one."""
        plan = self._plan(x, weight, out, *scales)
        stream = self._transfers.stream()
        workspace = self._workspaces.get(stream.value)
        if workspace is None:
            # work on another stream may overlap with that on this one
            self._refuse_capture("a workspace")
            workspace = self._allocate((_WORKSPACE_BYTES,), "uint8")
            self._workspaces[stream.value] = workspace
        tensors = weight, x, out, workspace, *scales
        addresses = [tensor.data_ptr() for tensor in tensors]
        if reduce(or_, addresses) % _ALIGNMENT:
            raise _unaligned(plan.gemm, tensors)
        for place, address in zip(plan.places, addresses, strict=False):
            place.value = address
        for pointer in plan.pointers:
            # called twice a GEMM, and needs no context
            status = self._set_pointer(*pointer)
            if status:
                raise self._functions.error(status, plan.gemm, _SET_OPERATION)
        self._functions.call(plan.gemm, "cublasLtMatmul", *plan.arguments, stream)

    def _plan(self, x: Tensor, weight: Tensor, out: Tensor, *scales: Tensor) -> _Plan:
        """The plan for these arguments, which are checked when it is made."""
        # dtypes by identity: to hash one of Paddle's takes as long as all the rest
        key = (
            *(*x.shape, *x.stride(), id(x.dtype), *weight.shape, *weight.stride()),
            *(id(weight.dtype), *out.shape, *out.stride(), id(out.dtype)),
        )
        for tensor in scales:
            key += *tensor.shape, *tensor.stride()
        plan = self._plans.get(key)
        if plan is None:
            gemm = _checked(x, weight, out, *scales)
            self._check_device(gemm, x, weight, out, *scales)
            self._plans[key] = plan = self._new_plan(gemm)
        return plan

    def _check_device(self, gemm: Gemm, *tensors: Tensor) -> None:
        """Refuse tensors that are elsewhere: cuBLASLt would read their addresses here."""
        for device in map(self._api.device_of, tensors):
            if device != self._device:
                raise LaunchError(
                    f"cuBLASLt: {gemm}: a tensor is on device {device}, not {self._device}"
                )

    def _new_plan(self, gemm: Gemm) -> _Plan:
        """Layouts, and the algorithm that cuBLASLt chooses."""
        self._refuse_capture(f"a plan for {gemm}")
        operation = self._operation(gemm.is_fp8)
        operand, result = (_FP8, _BFLOAT16) if gemm.is_fp8 else (_BFLOAT16, _FLOAT32)
        # rows follow each other without a gap
        layouts = [
            self._functions.made(
                *("cublasLtMatrixLayoutCreate", kind),
                *map(ctypes.c_int64, (width, rows, width)),
            )
            for kind, width, rows in (
                (operand, gemm.inputs, gemm.outputs),
                (operand, gemm.inputs, gemm.rows),
                (result, gemm.outputs, gemm.rows),
            )
        ]
        a, b, d = layouts
        algorithms, count = (_Algorithm * _MOST_ALGORITHMS)(), ctypes.c_int()
        self._functions.call(
            *(gemm, "cublasLtMatmulAlgoGetHeuristic", self._handle, operation, a, b, d, d),
            *(self._preference, _MOST_ALGORITHMS, algorithms, ctypes.byref(count)),
        )
        if not count.value:
            raise DeviceError(f"cuBLASLt: no algorithm serves {gemm}")
        weight, x, out, workspace, *scales = places = [ctypes.c_void_p() for _ in range(6)]
        pointers = [
            (operation, attribute, ctypes.byref(place), _POINTER_BYTES)
            for attribute, place in zip(_SCALES, scales, strict=True)
            if gemm.is_fp8
        ]
        matrices = self._handle, operation, _ONE, weight, a, x, b, _ZERO, out, d, out, d
        size = ctypes.c_size_t(_WORKSPACE_BYTES)
        # the first algorithm is the one that cuBLASLt expects to be the fastest
        arguments = *matrices, ctypes.byref(algorithms), workspace, size
        return _Plan(gemm, places, pointers, arguments)

    def _operation(self, is_fp8: bool) -> ctypes.c_void_p:
        """cuBLASLt's description of GEMMs of a kind, made at the first call."""
        if is_fp8 not in self._operations:
            operation = self._functions.made("cublasLtMatmulDescCreate", _COMPUTE_32F, _FLOAT32)
            attributes: dict[int, Any] = {_TRANSPOSE_A: ctypes.c_int32(1)}
            if is_fp8:
                modes = {_A_SCALE_MODE: _BLOCKS_OF_128, _B_SCALE_MODE: _VECTORS_OF_128}
                attributes |= {mode: ctypes.c_int32(value) for mode, value in modes.items()}
                # the heuristic refuses null pointers, and reads nothing there
                attributes |= dict.fromkeys(_SCALES, ctypes.c_void_p(_ALIGNMENT))
            for attribute, value in attributes.items():
                self._functions.set(_SET_OPERATION, operation, attribute, value)
            self._operations[is_fp8] = operation
        return self._operations[is_fp8]

    def _refuse_capture(self, what: str) -> None:
        if self._transfers.is_capturing():
            raise DeviceError(
                f"cuBLASLt: {what} cannot be made in a capture; run the GEMM on this stream before"
            )


def _checked(x: Tensor, weight: Tensor, out: Tensor, *scales: Tensor) -> Gemm:
    """The GEMM of these arguments, which are refused where they do not fit each other."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    operator, operand, result = "linear", "bfloat16", "float32"
    sides: list[Any] = []
    if scales:
        operator, operand, result = "fp8_linear", "uint8", "bfloat16"
        if inputs % (4 * _GROUP) or outputs % 8 or rows != padded_rows(rows):
            raise ShapeError(
                f"fp8_linear: got {rows} rows of x and a weight of {[outputs, inputs]}, allowed "
                f"are padded_rows(num_tokens), a multiple of 8 and one of {4 * _GROUP}"
            )
        groups = inputs // _GROUP
        shapes = (groups, rows), (-(-outputs // _GROUP), groups)
        sides = [*zip(("scales_x", "scales_w"), scales, shapes, ["float32"] * 2, strict=True)]
    for name, tensor, shape, dtype in (
        ("x", x, (rows, inputs), operand),
        ("weight", weight, (outputs, inputs), operand),
        ("out", out, (rows, outputs), result),
        *sides,
    ):
        check_array(operator, name, tensor, shape, (dtype,))
        if not tensor.is_contiguous():
            raise ShapeError(f"{operator}: {name} of shape {list(shape)} is not contiguous")
    return Gemm(rows, inputs, outputs, bool(scales))


def _unaligned(gemm: Gemm, tensors: Iterable[Tensor]) -> LaunchError:
    """What to say of the first tensor that begins where cuBLASLt cannot read."""
    shape = next(list(t.shape) for t in tensors if t.data_ptr() % _ALIGNMENT)
    return LaunchError(
        f"cuBLASLt: {gemm}: the tensor of shape {shape} begins off a multiple of {_ALIGNMENT} "
        "bytes; copy it first"
    )


_known: dict[tuple[DeviceApi, int], Cublaslt] = {}


def cublaslt_for(tensor: Tensor, allocate: Allocate) -> Cublaslt:
    """cuBLASLt on the device of a tensor, where `allocate` makes others; one object a device.

    Raises:
        BackendUnavailable: there is no cuBLASLt, or no library is known for the tensor's type.
        DeviceError: cuBLASLt cannot start.
    """
    api = api_for_type(type(tensor))
    place = api, api.device_of(tensor)
    if place not in _known:
        _known[place] = Cublaslt(*place, allocate, library())
    return _known[place]
