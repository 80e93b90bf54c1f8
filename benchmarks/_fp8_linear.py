"""A linear layer in block FP8 on torch tensors, as FastDeploy and vLLM run one on Hopper.

Activations are quantised per token and 128 values in a launch of their own, weights per block of
128 x 128; cuBLASLt multiplies them (CUDA 12.9 or newer).
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

GROUP = 128
_FP8_MAX = 448.0
# cuBLASLt has no such GEMM for fewer rows
_MIN_ROWS = 8


class Fp8Linear:
    """x @ weight with both in FP8.

    Args:
        weight: [in, out], of any float dtype; `in` is a multiple of 128.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        inputs, outputs = weight.shape
        rows = -(-outputs // GROUP)
        padded = weight.new_zeros(rows * GROUP, inputs, dtype=torch.float32)
        padded[:outputs] = weight.T
        blocks = padded.view(rows, GROUP, inputs // GROUP, GROUP)
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / _FP8_MAX
        codes = (blocks / scale[:, None, :, None]).view(rows * GROUP, inputs)[:outputs]
        self._codes, self._scale = codes.to(torch.float8_e4m3fn).contiguous(), scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 [num_tokens, out] of bfloat16 [num_tokens, in]."""
        codes, scale = quantized(x)
        y = torch._scaled_mm(
            codes, self._codes.T, scale_a=scale, scale_b=self._scale.T, out_dtype=torch.bfloat16
        )
        return y[: x.shape[0]]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self._codes.nbytes + self._scale.nbytes

    def clone(self) -> Fp8Linear:
        """The same in other memory."""
        other = object.__new__(Fp8Linear)
        other._codes, other._scale = self._codes.clone(), self._scale.clone()
        return other


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes [rows, in] and scales [rows, in / 128], stored by column; rows from 8 on."""
    num_tokens, inputs = x.shape
    rows, groups = max(num_tokens, _MIN_ROWS), inputs // GROUP
    codes = torch.empty(rows, inputs, device=x.device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(groups, rows, device=x.device, dtype=torch.float32)
    _quantize[(num_tokens, groups)](x, codes, scale, inputs, rows, _FP8_MAX, GROUP)
    return codes, scale.T


@triton.jit
def _quantize(x_ptr, codes_ptr, scale_ptr, inputs, rows, fp8_max, GROUP: tl.constexpr):
    """One group of 128 values of a token."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = token * inputs + group * GROUP + tl.arange(0, GROUP)
    values = tl.load(x_ptr + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / fp8_max
    tl.store(codes_ptr + at, (values / scale).to(tl.float8e4nv))
    tl.store(scale_ptr + group * rows + token, scale)
