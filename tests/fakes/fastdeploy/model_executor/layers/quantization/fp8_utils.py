"""`layers/quantization/fp8_utils.py`: e4m3 with a scale for each group of a row."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy import _counters, _fp8
from fastdeploy._arrays import host, tensor_of


def per_token_group_quant_fp8(
    x: Any,
    group_size: int,
    column_major_scales: bool = False,
    use_ue8m0: bool = False,
) -> tuple[Any, Any]:
    """e4m3 [rows, width] and float32 scales [rows, width / group_size] of a 2-D tensor.

    Args:
        use_ue8m0: scales are powers of two, rounded up.
    """
    _counters.launch("per_token_group_quant_fp8")
    if x.ndim != 2 or x.shape[1] % group_size or column_major_scales:
        raise ValueError(f"per_token_group_quant_fp8: x is {x.shape}, group_size {group_size}")
    values = host(x).astype(np.float32)
    groups = values.reshape(len(values), -1, group_size)
    absmax = np.abs(groups).max(-1)
    if use_ue8m0:
        scales = _fp8.power_of_two_scales(absmax)
    else:
        scales = np.maximum(absmax, np.float32(1e-4)) / _fp8.LARGEST
    codes = _fp8.encode(groups / scales[..., None]).reshape(values.shape)
    return (
        tensor_of(codes, x.place, "float8_e4m3fn"),
        tensor_of(scales.astype(np.float32), x.place),
    )
