"""GEMMs by cuBLASLt through ctypes: bfloat16 to float32, and FP8 with block scales on Hopper.

Paddle's `matmul` rounds results of bfloat16 operands to bfloat16, and supports no block scales.

Matrices of cuBLASLt are column-major, so it reads a [rows, columns] tensor as the transpose. Here
out = x @ weight^T is computed as out^T = weight @ x^T. So its operand A is the weight, and B is x.

Source: NVIDIA, cuBLAS documentation, "Using the cuBLASLt API"; scales as in "128-element 1D and
128x128 2D Block Scaling for FP8 Data Types".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add, or_
from typing import Any, NamedTuple

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import Transfers
from fd_dsa.errors import DeviceError, LaunchError, ShapeError
from fd_dsa.ops.arrays import check_array
from fd_dsa.ops.cublaslt_library import Functions, library
from fd_dsa.ops.dense_kernels import GROUP, padded_rows
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.compile_ahead import MODE
from fd_dsa.triton_runtime.device_api import DeviceApi, api_for_type

_ALIGNMENT, _WORKSPACE_BYTES, _MAX_ALGORITHMS = 16, 32 << 20, 8

# values of the enumerations in library_types.h, cublas_api.h and cublasLt.h
_FLOAT32, _BFLOAT16, _FP8 = 0, 14, 28
_COMPUTE_32F = 68
_TRANSPOSE_A, _A_SCALE_MODE, _B_SCALE_MODE = 3, 31, 32
# attributes of the addresses of the scales of x (B) and of the weight (A)
_SCALES = 18, 17
_BLOCKS_OF_128, _VECTORS_OF_128 = 5, 4
_MAX_WORKSPACE, _REDUCTION_MASK, _MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# partial sums are stored in float32 and added in a step of their own; the other schemes add in the
# order in which blocks finish, or round the parts to the type of the result
_REDUCE_IN_WORKSPACE = 2

_SET_OPERATION = "cublasLtMatmulDescSetAttribute"
_SET_PREFERENCE = "cublasLtMatmulPreferenceSetAttribute"
_POINTER_BYTES = ctypes.c_size_t(ctypes.sizeof(ctypes.c_void_p))
_FACTORS = ctypes.c_float(1), ctypes.c_float(0)
_ONE, _ZERO = map(ctypes.byref, _FACTORS)


class _Algorithm(ctypes.Structure):
    """Structure cublasLtMatmulHeuristicResult_t, which begins with the algorithm."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Gemm(NamedTuple):
    """Shape and kind of a GEMM.

    Attributes:
        rows: rows of x and of the result.
        inputs: columns of a group of x and of the weight.
        outputs: rows of a group's weight.
        is_fp8: True for block-scaled FP8, False for bfloat16.
        groups: groups of inputs with a weight each.
    """

    rows: int
    inputs: int
    outputs: int
    is_fp8: bool
    groups: int = 1

    def __str__(self) -> str:
        kind = "block-scaled FP8" if self.is_fp8 else "bfloat16"
        count = f"{self.groups} x " if self.groups > 1 else ""
        return f"{count}{kind} [{self.rows}, {self.inputs}] x [{self.outputs}, {self.inputs}]^T"

    @property
    def steps(self) -> tuple[int, ...]:
        """Bytes from a group to the next one in FP8, in the order of a plan's places."""
        depth, blocks = self.inputs // GROUP, self.outputs // GROUP
        scales = 4 * depth * self.rows, 4 * depth * blocks
        return self.outputs * self.inputs, self.inputs, 2 * self.outputs, 0, *scales


class _Plan(NamedTuple):
    """Arguments of cublasLtMatmul for GEMMs of one shape, without the stream.

    Attributes:
        gemm: shape and kind.
        places: addresses of weight, x, out, workspace, and the scales of x and of the weight.
            Each launch writes them first.
        pointers: arguments of the calls that set the addresses of scales in the operation
            descriptor. All plans of a kind share the descriptor, and a launch reads it at once.
        arguments: arguments with pointers to the places.
    """

    gemm: Gemm
    places: Sequence[ctypes.c_void_p]
    pointers: Sequence[tuple[Any, ...]]
    arguments: Sequence[Any]


class Cublaslt:
    """GEMMs of cuBLASLt on one device, for one thread at a time.

    The first GEMM of a shape makes its plan. The first GEMM on a stream allocates the stream's
    workspace of 32 MiB. Other GEMMs only launch, on the current stream of the tensors' library, and
    can be captured in a CUDA graph. Sums have a fixed order. Addresses are multiples of 16 bytes.

    A GEMM raises ShapeError, DtypeError or LaunchError for arguments that do not fit. It raises
    DeviceError if cuBLASLt fails, or if a plan or workspace is missing in a capture.

    Args:
        api: interface of the tensors' library.
        device: number of the device.
        allocate: allocator of tensors on the device.
        library: cuBLASLt's C functions.
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
        """Set out = x @ weight^T with float32 sums. All tensors are contiguous.

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
        """Set out = x @ weight^T of e4m3 codes, with a scale for each 128 inputs and float32 sums.

        If rows of x are longer than those of the weight, each group of their inputs has a weight of
        its own, and a GEMM. The weights of the groups are one below the other.

        cuBLASLt uses the number of rows as the stride of `scales_x`, and needs at least 8 rows. So
        the arrays of tokens have `padded_rows(num_tokens)` rows. Rows past the tokens may have any
        values, and affect only the same rows of `out`. All tensors are contiguous.

        Args:
            codes_x: uint8 [rows, groups * inputs], inputs a multiple of 512.
            scales_x: float32 [groups * inputs / 128, rows].
            codes_w: uint8 [groups * outputs, inputs], outputs a multiple of 8, or of 128 if there
                are several groups.
            scales_w: float32 [ceil(groups * outputs / 128), inputs / 128].
            out: bfloat16 [rows, groups * outputs].
        """
        self._run(codes_x, codes_w, out, scales_x, scales_w)

    def _run(self, x: Tensor, weight: Tensor, out: Tensor, *scales: Tensor) -> None:
        """Enqueue a GEMM, which is an FP8 GEMM if there are scales of x and of the weight."""
        if MODE.ahead is not None:
            return
        plan = self._plan(x, weight, out, *scales)
        stream = self._transfers.stream()
        workspace = self._workspaces.get(stream.value)
        if workspace is None:
            # a workspace for each stream, because streams may overlap
            self._refuse_capture("a workspace")
            workspace = self._allocate((_WORKSPACE_BYTES,), "uint8")
            self._workspaces[stream.value] = workspace
        tensors = weight, x, out, workspace, *scales
        addresses = [tensor.data_ptr() for tensor in tensors]
        if reduce(or_, addresses) % _ALIGNMENT:
            raise _unaligned(plan.gemm, tensors)
        for group in range(plan.gemm.groups):
            if group:
                addresses = list(map(add, addresses, plan.gemm.steps))
            for place, address in zip(plan.places, addresses, strict=False):
                place.value = address
            for pointer in plan.pointers:
                # a direct call, because it needs no context and each GEMM makes two
                status = self._set_pointer(*pointer)
                if status:
                    raise self._functions.error(status, plan.gemm, _SET_OPERATION)
            self._functions.call(plan.gemm, "cublasLtMatmul", *plan.arguments, stream)

    def _plan(self, x: Tensor, weight: Tensor, out: Tensor, *scales: Tensor) -> _Plan:
        """Return the plan for these arguments, which are checked when the plan is made."""
        # dtypes by identity, because the hash of a Paddle dtype takes as long as all the rest
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
        """Raise LaunchError for a tensor on another device, because cuBLASLt checks no address."""
        for device in map(self._api.device_of, tensors):
            if device != self._device:
                raise LaunchError(
                    f"cuBLASLt: {gemm}: a tensor is on device {device}, not {self._device}"
                )

    def _new_plan(self, gemm: Gemm) -> _Plan:
        """Make the layouts, and let cuBLASLt select the algorithm."""
        self._refuse_capture(f"a plan for {gemm}")
        operation = self._operation(gemm.is_fp8)
        operand, result = (_FP8, _BFLOAT16) if gemm.is_fp8 else (_BFLOAT16, _FLOAT32)
        # rows of all groups without gaps
        layouts = [
            self._functions.made(
                *("cublasLtMatrixLayoutCreate", kind),
                *map(ctypes.c_int64, (width, rows, groups * width)),
            )
            for kind, width, rows, groups in (
                (operand, gemm.inputs, gemm.outputs, 1),
                (operand, gemm.inputs, gemm.rows, gemm.groups),
                (result, gemm.outputs, gemm.rows, gemm.groups),
            )
        ]
        a, b, d = layouts
        algorithms, count = (_Algorithm * _MAX_ALGORITHMS)(), ctypes.c_int()
        self._functions.call(
            *(gemm, "cublasLtMatmulAlgoGetHeuristic", self._handle, operation, a, b, d, d),
            *(self._preference, _MAX_ALGORITHMS, algorithms, ctypes.byref(count)),
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
        # cuBLASLt expects the first algorithm to be the fastest
        arguments = *matrices, ctypes.byref(algorithms), workspace, size
        return _Plan(gemm, places, pointers, arguments)

    def _operation(self, is_fp8: bool) -> ctypes.c_void_p:
        """Return the operation descriptor of a kind of GEMMs, made by the first call."""
        if is_fp8 not in self._operations:
            operation = self._functions.made("cublasLtMatmulDescCreate", _COMPUTE_32F, _FLOAT32)
            attributes: dict[int, Any] = {_TRANSPOSE_A: ctypes.c_int32(1)}
            if is_fp8:
                modes = {_A_SCALE_MODE: _BLOCKS_OF_128, _B_SCALE_MODE: _VECTORS_OF_128}
                attributes |= {mode: ctypes.c_int32(value) for mode, value in modes.items()}
                # any address but null, which the heuristic rejects; it reads no scale
                attributes |= dict.fromkeys(_SCALES, ctypes.c_void_p(_ALIGNMENT))
            for attribute, value in attributes.items():
                self._functions.set(_SET_OPERATION, operation, attribute, value)
            self._operations[is_fp8] = operation
        return self._operations[is_fp8]

    def _refuse_capture(self, what: str) -> None:
        """Raise DeviceError if the current stream is being captured."""
        if self._transfers.is_capturing():
            raise DeviceError(
                f"cuBLASLt: {what} cannot be made in a capture; run the GEMM on this stream before"
            )


def _checked(x: Tensor, weight: Tensor, out: Tensor, *scales: Tensor) -> Gemm:
    """Check arguments against each other and return their GEMM."""
    (rows, width), (outputs, inputs) = x.shape, weight.shape
    operator, operand, result, groups = "linear", "bfloat16", "float32", 1
    sides: list[Any] = []
    if scales:
        operator, operand, result = "fp8_linear", "uint8", "bfloat16"
        groups = max(1, width // max(1, inputs))
        rule = 8 if groups == 1 else groups * GROUP
        if inputs % (4 * GROUP) or outputs % rule or rows != padded_rows(rows):
            raise ShapeError(
                f"fp8_linear: got {rows} rows of x and a weight of {[outputs, inputs]}, allowed "
                f"are padded_rows(num_tokens), a multiple of {rule} and one of {4 * GROUP}"
            )
        depth = inputs // GROUP
        shapes = (groups * depth, rows), (-(-outputs // GROUP), depth)
        sides = [*zip(("scales_x", "scales_w"), scales, shapes, ["float32"] * 2, strict=True)]
    for name, tensor, shape, dtype in (
        ("x", x, (rows, groups * inputs), operand),
        ("weight", weight, (outputs, inputs), operand),
        ("out", out, (rows, outputs), result),
        *sides,
    ):
        check_array(operator, name, tensor, shape, (dtype,))
        if not tensor.is_contiguous():
            raise ShapeError(f"{operator}: {name} of shape {list(shape)} is not contiguous")
    return Gemm(rows, inputs, outputs // groups, bool(scales), groups)


def _unaligned(gemm: Gemm, tensors: Iterable[Tensor]) -> LaunchError:
    """Return the error for the first tensor that is not aligned."""
    shape = next(list(t.shape) for t in tensors if t.data_ptr() % _ALIGNMENT)
    return LaunchError(
        f"cuBLASLt: {gemm}: the tensor of shape {shape} is not aligned to {_ALIGNMENT} bytes; "
        "copy it first"
    )


_known: dict[tuple[DeviceApi, int], Cublaslt] = {}


def cublaslt_for(tensor: Tensor, allocate: Allocate) -> Cublaslt:
    """Return cuBLASLt on the device of a tensor, one object for each device.

    Args:
        tensor: a tensor on the device.
        allocate: allocator of tensors on the device.

    Raises:
        BackendUnavailable: cuBLASLt is missing, or the tensor's library is unknown.
        DeviceError: cuBLASLt cannot start.
    """
    api = api_for_type(type(tensor))
    place = api, api.device_of(tensor)
    if place not in _known:
        _known[place] = Cublaslt(*place, allocate, library())
    return _known[place]
