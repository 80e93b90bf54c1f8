"""What the host builder needs and takes: its imports and its arrays."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import fd_dsa.v4_prepare as package
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, V4PrepareConfig
from fd_dsa.v4_prepare.checks import RowChecks
from tests.v4_prepare.golden import CASES, config_of


@pytest.fixture
def cfg() -> V4PrepareConfig:
    return config_of(CASES["G2"]["config"])


def test_numpy_alone_is_enough() -> None:
    """A step is built where neither Paddle nor Triton can be imported."""
    code = """
import sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("paddle", "triton", "torch"):
            raise AssertionError(name)
sys.meta_path.insert(0, Closed())
from fd_dsa.v4_prepare import V4PrepareConfig, csa_translate, fused_list, v4_prepare_np
cfg = V4PrepareConfig(8, 0, 16, 4, 16, 3, 4, 32, 6, 4, 4, 1, 96)
out = v4_prepare_np(cfg, [21], [1], [3], [[19, 26]])
print(out.hca_idx[0], len(fused_list(out, "csa")[1]), csa_translate(out, [[19, 26]], [[4, 0, 9]]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[0] == "51 11 [136 108  -1]"


def test_the_package_names_what_it_has() -> None:
    assert package.v4_prepare_np.__module__ == "fd_dsa.v4_prepare.host"
    with pytest.raises(AttributeError, match="has no attribute 'v4_prepare_torch'"):
        package.v4_prepare_torch  # noqa: B018


def test_arrays_have_one_field_an_output(cfg: V4PrepareConfig) -> None:
    names = {field.name for field in fields(V4Arrays)}
    assert names == {"config", *OUTPUT_SHAPES(cfg)}
    out = V4Arrays.allocate(cfg)
    for name, shape in OUTPUT_SHAPES(cfg).items():
        array = getattr(out, name)
        assert (array.shape, array.dtype) == (shape, np.int32)


@pytest.mark.parametrize(
    ("name", "array", "error", "text"),
    [
        ("cu_q", np.zeros(4, np.int32), ShapeError, r"cu_q: got \(4,\), must be \(5,\)"),
        ("counts", None, ShapeError, r"counts: got NoneType, must be \(8,\)"),
        ("hca_idx", None, ShapeError, r"hca_idx: got NoneType, must be \(96,\)"),
        ("cu_q", np.zeros(5, np.int64), DtypeError, "cu_q: got int64 with strides"),
        ("cu_q", np.zeros(10, np.int32)[::2], DtypeError, r"cu_q: got int32 with strides \(8,\)"),
    ],
)
def test_arrays_that_do_not_fit(
    cfg: V4PrepareConfig, name: str, array: Any, error: type[ValueError], text: str
) -> None:
    arrays = {field: np.zeros(shape, np.int32) for field, shape in OUTPUT_SHAPES(cfg).items()}
    with pytest.raises(error, match=text):
        V4Arrays(cfg, **(arrays | {name: array}))


def test_checks_keep_nothing_of_an_earlier_step(cfg: V4PrepareConfig) -> None:
    """One object judges step after step; rows behind a short step do not count."""
    checks = RowChecks(cfg)
    bad = [np.array(one) for one in ([5, 5, 5, 97], [1, 1, 1, 5], [0, 1, 2, 2])]
    assert checks.num_tokens(*bad) == -1
    assert checks.num_tokens(*(one[:3] for one in bad)) == 3
    assert checks.num_tokens(*(one[:0] for one in bad)) == 0
    for wrong in ([0, 1, 1], [0, 1, 4], [-1, 0, 1]):
        assert checks.num_tokens(bad[0][:3], bad[1][:3], np.array(wrong)) == -1
