"""Block FP8 of linear layers (`layers/quantization/block_wise_fp8.py`), in the form of Hopper.

Weights are float8_e4m3fn [out, in] with a float32 scale for each block of 128 x 128. Here the
loader quantises, upstream so does `process_weights_after_loading`; only layers that every rank has
whole are quantised, and activations stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy._arrays import host

_LARGEST = np.float32(448.0)


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
        shape = [layer.output_size, layer.input_size]
        blocks = [-(-size // 128) for size in shape]
        zero = paddle.nn.initializer.Constant(0)
        layer.weight, layer.weight_scale_inv = (
            layer.create_parameter(size, dtype=dtype, default_initializer=zero)
            for size, dtype in ((shape, "float8_e4m3fn"), (blocks, "float32"))
        )
        layer.weight.stop_gradient = layer.weight_scale_inv.stop_gradient = True

    def load(self, layer: Any, weight: np.ndarray) -> None:
        """Quantise a weight [in, out] into the layer's parameters."""
        weight, scale = weight.T.copy(), np.zeros(layer.weight_scale_inv.shape, np.float32)
        for row, column in np.ndindex(*scale.shape):
            block = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            scale[row, column] = max(np.abs(weight[block]).max(), 1e-4) / _LARGEST
            weight[block] /= scale[row, column]
        with paddle.no_grad():
            layer.weight.copy_(paddle.to_tensor(weight).astype("float8_e4m3fn"), False)
            layer.weight_scale_inv.copy_(paddle.to_tensor(scale), False)

    def apply(self, layer: Any, x: Any) -> Any:
        """[num_tokens, out] of [num_tokens, in]."""
        weight = layer.weight.astype("float32").numpy()
        scale = host(layer.weight_scale_inv).repeat(128, 0).repeat(128, 1)
        weight = weight * scale[: weight.shape[0], : weight.shape[1]]
        return paddle.matmul(x, paddle.to_tensor(weight.T)).astype(x.dtype)
