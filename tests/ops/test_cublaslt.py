"""GEMMs by cuBLASLt: what the library is asked for, and what is refused before it is."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.errors import BackendUnavailable, DeviceError, DtypeError, LaunchError, ShapeError
from fd_dsa.ops import cublaslt, cublaslt_library
from fd_dsa.ops.cublaslt import cublaslt_for
from fd_dsa.ops.cublaslt_library import fp8_unsupported_reason, library, library_names
from fd_dsa.ops.dense_kernels import padded_rows
from fd_dsa.triton_runtime import register_device_api
from tests.ops.cublaslt_fakes import WORKSPACE, Bench, Blas, Driver, Tensor
from tests.triton_runtime.fakes import FakeApi, driven_by

pytestmark = pytest.mark.triton

NOT_SUPPORTED = 15
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """cuBLASLt on one device, with the calls that it gets."""
    with driven_by(Driver()) as driver:
        yield Bench(driver)


X, W = Tensor(0x1000, (5, 64)), Tensor(0x2000, (48, 64))
OUT = Tensor(0x3000, (5, 48), "fake.float32")


def fp8(rows: int = 8, inputs: int = 512, outputs: int = 136, groups: int = 1) -> list[Tensor]:
    """Arguments of `fp8_linear` that fit, `outputs` of all groups."""
    return [
        Tensor(0x1000, (rows, groups * inputs), "fake.uint8"),
        Tensor(0x2000, (groups * inputs // 128, rows), "fake.float32"),
        Tensor(0x3000, (outputs, inputs), "fake.uint8"),
        Tensor(0x4000, (-(-outputs // 128), inputs // 128), "fake.float32"),
        Tensor(0x5000, (rows, outputs), "fake.bfloat16"),
    ]


MAPS = """
7f00-7f10 r--p 00000000 08:01 11 /opt/a b/lib/{}
7f10-7f20 r-xp 00001000 08:01 11 /opt/a b/lib/{}
7f20-7f30 rw-p 00000000 00:00 0
7f30-7f40 rw-p 00000000 00:00 0  [heap]
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("libcublasLt.so.12", "libcublas.so.12"), ("/opt/a b/lib/libcublasLt.so.12",)),
        (("libcudart.so.13", "libcublas.so.13.1"), ("/opt/a b/lib/libcublasLt.so.13.1",)),
        (("libc.so.6", "libm.so.6"), ("libcublasLt.so.13", "libcublasLt.so.12")),
    ],
)
def test_the_library_is_that_of_the_process(
    files: tuple[str, str], expected: tuple[str, ...]
) -> None:
    assert library_names(MAPS.format(*files)) == expected


def test_import_opens_no_library() -> None:
    code = (
        "import fd_dsa.ops.cublaslt; from pathlib import Path; "
        "print('cublas' in Path('/proc/self/maps').read_text())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "False\n", result.stderr


def test_a_machine_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(cublaslt_library, "interpreter_refusal", lambda: "")
    library.cache_clear()
    with pytest.raises(BackendUnavailable, match="no cuBLASLt is loaded or installed"):
        library()
    assert fp8_unsupported_reason(90).startswith("no cuBLASLt is loaded or installed")


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        (120804, 90, "cuBLASLt 120804 has no block scales, 120900 and newer have"),
        (120900, 90, ""),
        (130100, 90, ""),
        (130100, 100, "only on GPUs of capability 90, not 100"),
    ],
)
def test_fp8_unsupported_reason(
    monkeypatch: pytest.MonkeyPatch, version: int, capability: int, reason: str
) -> None:
    blas = Blas(Driver())
    monkeypatch.setattr(blas, "cublasLtGetVersion", lambda: version)
    monkeypatch.setattr(cublaslt_library, "library", lambda: blas)
    monkeypatch.setattr(cublaslt_library, "interpreter_refusal", lambda: "")
    found = fp8_unsupported_reason(capability)
    assert found.endswith(reason) and bool(found) == bool(reason)
    monkeypatch.setattr(cublaslt_library, "interpreter_refusal", lambda: "interpreted")
    assert fp8_unsupported_reason(capability) == "interpreted"


def test_rows_and_scales_as_cublaslt_wants_them() -> None:
    assert [padded_rows(n) for n in (0, 1, 8, 9, 13, 2048)] == [8, 8, 8, 12, 16, 2048]


def test_a_linear_layer_in_the_terms_of_cublaslt(bench: Bench) -> None:
    """Column-major: A is the weight, transposed, B is x, and D is out."""
    bench.lt.linear(X, W, OUT)
    bench.lt.linear(X, W, replace(OUT, address=0x4000))
    bench.lt.linear(Tensor(0x1000, (0, 64)), W, Tensor(0x3000, (0, 48), "fake.float32"))
    first, second = bench.blas.launches
    assert first["addresses"] == (0x2000, 0x1000, 0x3000)
    assert second["addresses"] == (0x2000, 0x1000, 0x4000)
    assert first["layouts"] == [(14, 64, 48, 64), (14, 64, 5, 64), (0, 48, 5, 48)]
    assert first["attributes"] == {3: 1}
    # CUBLAS_COMPUTE_32F
    assert bench.blas.computes == [(68, 0)]


def test_fp8_in_the_terms_of_cublaslt(bench: Bench) -> None:
    operands = fp8()
    bench.lt.fp8_linear(*operands)
    (launch,) = bench.blas.launches
    assert launch["addresses"] == (0x3000, 0x1000, 0x5000)
    assert launch["layouts"] == [(28, 512, 136, 512), (28, 512, 8, 512), (14, 136, 8, 136)]
    # transposed A, its scales and B's, blocks of 128 x 128 for A and vectors of 128 for B
    assert launch["attributes"] == {3: 1, 17: 0x4000, 18: 0x2000, 31: 5, 32: 4}
    other = Tensor(0x8000, operands[3].shape, "fake.float32")
    bench.lt.fp8_linear(*operands[:3], other, operands[4])
    assert bench.blas.launches[-1]["attributes"][17] == 0x8000
    assert bench.blas.calls["cublasLtMatmulAlgoGetHeuristic"] == 1


def test_groups_in_the_terms_of_cublaslt(bench: Bench) -> None:
    """A group's operands are columns of wider rows, and rows of the weight and of both scales."""
    bench.lt.fp8_linear(*fp8(rows=12, outputs=3 * 256, groups=3))
    layouts = [(28, 512, 256, 512), (28, 512, 12, 1536), (14, 256, 12, 768)]
    for group, launch in enumerate(bench.blas.launches):
        assert launch["layouts"] == layouts
        weight, x, out = 0x3000 + group * 256 * 512, 0x1000 + group * 512, 0x5000 + group * 512
        assert launch["addresses"] == (weight, x, out)
        scales_w, scales_x = 0x4000 + group * 4 * 2 * 4, 0x2000 + group * 4 * 4 * 12
        assert launch["attributes"] == {3: 1, 17: scales_w, 18: scales_x, 31: 5, 32: 4}
    assert len(bench.blas.launches) == 3
    assert bench.blas.calls["cublasLtMatmulAlgoGetHeuristic"] == 1


def test_a_shape_is_planned_once_and_a_stream_has_one_workspace(bench: Bench) -> None:
    for stream, address in ((7, 0x1000), (7, 0x9000), (0, 0x1000), (7, 0x1000)):
        bench.api.stream = stream
        bench.lt.linear(Tensor(address, X.shape), W, OUT)
    assert bench.blas.calls["cublasLtMatmulAlgoGetHeuristic"] == 1
    assert [t.shape for t in bench.allocated] == [(WORKSPACE,)] * 2
    found = [(launch["stream"], launch["workspace"]) for launch in bench.blas.launches]
    assert found == [(7, 0x100000), (7, 0x100000), (None, 0x200000), (7, 0x100000)]
    assert [launch["addresses"][1] for launch in bench.blas.launches][1] == 0x9000
    preference = min(owner for owner, _ in bench.blas.attributes)
    preferred = {k: v for (owner, k), v in bench.blas.attributes.items() if owner == preference}
    # parts of sums are reduced in the workspace alone
    assert preferred == {1: WORKSPACE, 3: 2, 5: 16, 6: 16, 7: 16, 8: 16}


def changed(position: int, **fields: Any) -> list[Tensor]:
    """`fp8` with another tensor."""
    operands = fp8()
    operands[position] = replace(operands[position], **fields)
    return operands


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        (fp8(rows=4), ShapeError, "got 4 rows of x .* allowed are padded_rows"),
        (fp8(rows=13), ShapeError, "got 13 rows"),
        (fp8(inputs=384), ShapeError, "a multiple of 8 and one of 512"),
        (fp8(outputs=132), ShapeError, "a multiple of 8 and one of 512"),
        (fp8(outputs=136, groups=2), ShapeError, "a multiple of 256 and one of 512"),
        (changed(0, shape=(8, 1000)), ShapeError, r"x has shape \[8, 1000\], allowed is \[8, 512"),
        (changed(1, shape=(4, 12)), ShapeError, r"scales_x has shape \[4, 12\], allowed is \[4, 8"),
        (changed(3, shape=(2, 3)), ShapeError, r"scales_w has shape \[2, 3\], allowed is \[2, 4"),
        (changed(0, step=600), ShapeError, r"x of shape \[8, 512\] is not contiguous"),
        (changed(1, step=12), ShapeError, r"scales_x of shape \[4, 8\] is not contiguous"),
        (changed(1, dtype="fake.uint8"), DtypeError, "scales_x has dtype uint8"),
        (changed(0, dtype="fake.bfloat16"), DtypeError, "x has dtype bfloat16, allowed is uint8"),
        (changed(4, dtype="fake.float32"), DtypeError, "out has dtype float32"),
        (changed(4, shape=(8, 128)), ShapeError, r"out has shape \[8, 128\], allowed is \[8, 136"),
        (changed(2, address=0x3008), LaunchError, r"\[136, 512\] is not aligned to 16 bytes"),
        (changed(3, address=0x4004), LaunchError, r"\[2, 4\] is not aligned to 16 bytes"),
        (changed(1, device=1), LaunchError, "a tensor is on device 1, not 0"),
        (changed(2, device=-1), LaunchError, "the tensor is in host memory"),
    ],
)
def test_arguments_that_do_not_fit(
    bench: Bench, operands: list[Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bench.lt.fp8_linear(*operands)
    assert not bench.blas.launches


def test_operands_of_two_types_are_refused(bench: Bench) -> None:
    with pytest.raises(DtypeError, match="weight has dtype float32, allowed is bfloat16"):
        bench.lt.linear(X, replace(W, dtype="fake.float32"), OUT)


@pytest.mark.parametrize("function", ["cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul"])
def test_a_refusal_names_status_and_shapes(bench: Bench, function: str) -> None:
    bench.blas.statuses[function] = NOT_SUPPORTED
    shapes = r"block-scaled FP8 \[8, 512\] x \[136, 512\]\^T"
    with pytest.raises(DeviceError, match=f"{function}: CUBLAS_STATUS_15: {shapes}"):
        bench.lt.fp8_linear(*fp8())


def test_a_refused_pointer_of_scales(bench: Bench) -> None:
    bench.lt.fp8_linear(*fp8())
    bench.blas.statuses["cublasLtMatmulDescSetAttribute"] = 7
    with pytest.raises(DeviceError, match=r"DescSetAttribute: CUBLAS_STATUS_7: block-scaled FP8"):
        bench.lt.fp8_linear(*fp8())


def test_no_algorithm(bench: Bench) -> None:
    bench.blas.num_algorithms = 0
    with pytest.raises(DeviceError, match=r"no algorithm serves bfloat16 \[5, 64\] x"):
        bench.lt.linear(X, W, OUT)


def test_a_capture_takes_only_what_is_there(bench: Bench) -> None:
    bench.driver.capturing = True
    with pytest.raises(DeviceError, match=r"a plan for bfloat16 .* cannot be made in a capture"):
        bench.lt.linear(X, W, OUT)
    bench.driver.capturing = False
    bench.lt.linear(X, W, OUT)
    bench.driver.capturing = True
    bench.lt.linear(X, W, OUT)
    bench.api.stream = 8
    with pytest.raises(DeviceError, match="a workspace cannot be made in a capture"):
        bench.lt.linear(X, W, OUT)
    assert len(bench.blas.launches) == 2


def test_another_device_is_entered() -> None:
    with driven_by(Driver(num_devices=2)) as driver:
        driver.enter(0x1000)
        bench = Bench(driver, device=1)
        bench.lt.linear(*(replace(tensor, device=1) for tensor in (X, W, OUT)))
        assert driver.context() == 0x1000
    assert bench.blas.launches[0]["context"] == 0x1001


def test_a_device_has_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven_by(Driver(num_devices=2)) as driver:
        monkeypatch.setattr(cublaslt, "library", lambda: Blas(driver))
        register_device_api(Tensor, FakeApi())
        first = cublaslt_for(X, lambda shape, dtype: X)
        assert cublaslt_for(W, lambda shape, dtype: X) is first
        assert cublaslt_for(Tensor(0x1000, (1,), device=1), lambda shape, dtype: X) is not first
