"""Interface of a weight that multiplies activations.

On a CPU the activations of a step are NumPy arrays. On a device they are tensors, and a GEMM
reads no value back to the host, so that a step can be captured.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from fd_dsa.tensor import StepArray

_Linear = TypeVar("_Linear", bound="Linear")


class Linear(Protocol):
    """Weight of a GEMM, or one weight for each head: a HostMatrix or a DeviceMatrix."""

    def matmul(self, x: StepArray, out: StepArray | None = None) -> StepArray:
        """Multiply activations x [num_tokens, in] by the weight: [num_tokens, out].

        Args:
            out: float32 memory of the result. None allocates.
        """

    def matmul_by_head(self, x: StepArray) -> StepArray:
        """Multiply x [tokens, heads, in] by the weight of each head: [tokens, heads, out]."""

    def matmul_join_heads(self: _Linear, x: StepArray, reader: _Linear) -> StepArray:
        """Multiply as `matmul_by_head`: [num_tokens, heads * out].

        Args:
            x: [num_tokens, heads, in].
            reader: weight that multiplies the result. It decides the result's form.
        """

    def activated(self, gate_up: StepArray) -> StepArray:
        """Return silu(gate) * up of gate_up [num_tokens, 2 * in], in the form for `matmul`."""
