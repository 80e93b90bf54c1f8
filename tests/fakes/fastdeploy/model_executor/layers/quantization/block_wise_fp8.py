"""Block FP8 of linear layers (`layers/quantization/block_wise_fp8.py`), in the form of Hopper.

Weights are float8_e4m3fn [out, in] with a float32 scale for each block of 128 x 128, activations
are quantised per token and 128 values by every layer. Here the loader quantises, upstream so does
`process_weights_after_loading`; and here only layers that every rank has whole are quantised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy import _counters, _fp8
from fastdeploy._arrays import host

from .fp8_utils import per_token_group_quant_fp8


class BlockWiseFP8Config:
    """`fd_config.quant_config` of `--quantization block_wise_fp8`."""

    def __init__(self) -> None:
        self.weight_block_size = [128, 128]

    def get_quant_method(self, layer: Any) -> BlockWiseFP8LinearMethod:
        return BlockWiseFP8LinearMethod(self)


class BlockWiseFP8LinearMethod:
    """Makes, fills and applies the weights of one layer."""

    def __init__(self, quant_config: BlockWiseFP8Config) -> None:
        self.quant_config = quant_config

    def create_weights(self, layer: Any) -> None:
        zero = paddle.nn.initializer.Constant(0)
        shape = [layer.output_size, layer.input_size]
        blocks = [-(-size // 128) for size in shape]
        layer.weight = layer.create_parameter(
            shape, dtype="float8_e4m3fn", default_initializer=zero
        )
        layer.weight_scale_inv = layer.create_parameter(
            blocks, dtype="float32", default_initializer=zero
        )
        for parameter in (layer.weight, layer.weight_scale_inv):
            parameter.stop_gradient = True

    def load(self, layer: Any, weight: np.ndarray) -> None:
        """Quantise a weight [in, out] into the layer's parameters."""
        scale = np.zeros(layer.weight_scale_inv.shape, np.float32)
        codes = np.zeros(layer.weight.shape, np.uint8)
        for row, column in np.ndindex(*scale.shape):
            block = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            scale[row, column] = max(np.abs(weight.T[block]).max(), 1e-4) / _fp8.LARGEST
            codes[block] = _fp8.encode(weight.T[block] / scale[row, column])
        with paddle.no_grad():
            layer.weight.copy_(paddle.to_tensor(codes).view("float8_e4m3fn"), False)
            layer.weight_scale_inv.copy_(paddle.to_tensor(scale), False)

    def apply(self, layer: Any, x: Any) -> Any:
        """[num_tokens, out] of [num_tokens, in], both quantised."""
        _counters.launch("fp8_gemm_nt")
        codes, scales = per_token_group_quant_fp8(x, 128)
        values = codes.astype("float32") * scales.repeat_interleave(128, 1)
        weight = _fp8.decode(host(layer.weight.view("uint8")))
        scale = host(layer.weight_scale_inv).repeat(128, 0).repeat(128, 1)
        weight = weight * scale[: weight.shape[0], : weight.shape[1]]
        return paddle.matmul(values, paddle.to_tensor(weight.T)).astype(x.dtype)
