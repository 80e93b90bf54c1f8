"""Builder of the metadata that all layers of a step share."""

from __future__ import annotations

from typing import Any

from fd_dsa.device.allocation import Allocate, paddle_allocator
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.errors import BackendUnavailable
from fd_dsa.step.checks import StepHints, StepLimits
from fd_dsa.step.forward_meta import ForwardMeta
from fd_dsa.step.host_provider import HostProvider
from fd_dsa.step.views import View
from fd_dsa.tensor import Array, StepArray


class StepMetadataBuilder:
    """Builds the `ForwardMeta` of every step in buffers that are allocated once.

    Args:
        max_num_tokens: tokens a step may have, padding included.
        num_blocks: physical blocks of the cache, for the check of block ids; None = no upper
            bound.
        device: "cpu" = the arrays of a step are Paddle CPU tensors over the builder's memory;
            "numpy" = they are the NumPy arrays themselves, and Paddle is never imported;
            "gpu", "gpu:0" or a custom device such as "name:0" = Paddle tensors in its memory,
            filled by one launch of a Triton kernel.
        allocate: how the buffers on a device are made, `(shape, dtype name) -> tensor`, for
            tensors of another library that the launcher knows; None = Paddle's.
        int32_position_ids: whether a step's positions are written as int32 too, for operators
            that take no int64; in the same call and launch.

    Attributes:
        num_builds: metadata computations so far; it grows by one a step whatever the number of
            layers is, and not at all when `build` refuses its inputs.

    Raises:
        ValueError: a size that is no integer, below 1 or past int32.
        BackendUnavailable: no provider serves the device, or Paddle is missing.

    Not thread-safe: one builder serves one stream of steps.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks_per_seq: int,
        block_size: int,
        num_blocks: int | None = None,
        device: str = "cpu",
        allocate: Allocate | None = None,
        int32_position_ids: bool = False,
    ) -> None:
        self.limits = StepLimits(
            max_num_seqs, max_num_tokens, max_blocks_per_seq, block_size, num_blocks
        )
        self.device = device
        self.num_builds = 0
        self._provider = _provider_for(self.limits, device, allocate, int32_position_ids)

    def build(
        self,
        seq_lens_encoder: StepArray,
        seq_lens_decoder: StepArray,
        seq_lens_this_time: StepArray,
        block_tables: StepArray,
        num_padded_tokens: int | None = None,
        *,
        num_tokens: int | None = None,
        num_prefill_tokens: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> ForwardMeta:
        """Compute the metadata of one step, valid until the next `build` of this builder.

        All checks come before the first write: a refused step leaves the metadata of the step
        before it as it was.

        On "cpu" and "numpy" the inputs are NumPy arrays or Paddle CPU tensors, which are copied.

        On a device they are either four NumPy arrays, which are checked as on a CPU, copied to
        page-locked memory and from there to the device without waiting; or four tensors on the
        device. Tensors are used where they are: the kernel reads them when it runs, the metadata
        refers to them, and they must keep their values until the step has run (FastDeploy's
        `share_inputs` do). Only their shapes and dtypes are checked, and `num_tokens`,
        `num_prefill_tokens` and `max_seqlen_k` must be given. A table entry that is no block then
        gives slot -1. With FD_DSA_CHECK=1 in the environment when the builder is made, they are
        read back and checked in every step, for which the device is waited for.

        A build from tensors can be captured in a graph: a replay reads the same tensors again,
        for the rows and the padded tokens of the capture. Rows without tokens are idle.

        After every step that was built outside of a graph, all tokens of the buffers past the
        step's own hold padding, so a graph of layers may read any number of them; a replay of a
        captured build clears its own padded tokens alone. Of the windows that is so after a step
        that has them.

        Args:
            seq_lens_encoder: int32 [B]; tokens of a prefill row, 0 for a decode or idle row.
            seq_lens_decoder: int32 [B]; tokens of the row already in the cache.
            seq_lens_this_time: int32 [B]; tokens of the row in this step, 0 = idle.
            block_tables: int32 [B, max_blocks_per_seq]; physical block of each logical block.
                Entries past a row's length are copied but not looked at.
            num_padded_tokens: T of the token arrays; None = the number of tokens.
            num_tokens: tokens of the step, if the caller knows it; must agree. With device tensors
                it may be an upper bound: tokens past those of the rows become padding.
            num_prefill_tokens: tokens of prefill rows, likewise.
            max_seqlen_k: keys of the longest row, or an upper bound, which is then what the
                metadata says.

        Returns:
            ForwardMeta with B rows and T tokens. B may be below `max_num_seqs`, and a step may
            have no token at all.

        Raises:
            DtypeError, ShapeError: an input is not int32, or shapes disagree.
            CapacityError: more rows, tokens, padding or blocks than this builder was made for.
            ValueError: negative or inconsistent lengths, a needed block id that is no block, a
                keyword that is no integer or disagrees with the arrays; row and value are named.
            BackendUnavailable: a tensor on a device for a builder of "cpu" or "numpy".
            LaunchError: a tensor that is not on the builder's device.
            RuntimeError: host arrays during a graph capture.

        Cost: a fixed number of NumPy calls; no allocation that grows with the capacity. From
        device tensors: one launch, no copy, no allocation and no wait; from host arrays on a
        device, a copy to it beside the work of the step before, and one within it.
        Source: PaddlePaddle/FastDeploy #7367 and #7598.
        """
        arrays = (seq_lens_encoder, seq_lens_decoder, seq_lens_this_time, block_tables)
        hints = StepHints(num_tokens, num_prefill_tokens, max_seqlen_k, num_padded_tokens)
        return self.build_from(arrays, hints)

    def build_from(self, arrays: tuple[Array, ...], hints: StepHints) -> ForwardMeta:
        """Build a step from the four arrays and the keywords of `build` in one record."""
        hints.check_types()
        meta: ForwardMeta = self._provider.build(arrays, hints)
        self.num_builds += 1
        return meta


def _provider_for(
    limits: StepLimits, device: str, allocate: Allocate | None, int32_position_ids: bool
) -> Any:
    """Return the provider that checks and computes the steps of a builder."""
    if allocate is None and device == "numpy":
        return HostProvider(limits, lambda array: array, int32_position_ids)
    if allocate is None and device == "cpu":
        return HostProvider(limits, _paddle_view(), int32_position_ids)
    # imported here, because the kernel and its launcher need Triton
    from fd_dsa.step.device_provider import DeviceProvider

    return DeviceProvider(limits, allocate or paddle_allocator(device), int32_position_ids)


def _paddle_view() -> View:
    """Return the function that makes a Paddle tensor on the memory of a NumPy buffer."""
    try:
        import paddle  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "device: 'cpu' needs Paddle, which is not installed; install fd_dsa[cpu], or build "
            "with device='numpy'"
        ) from error
    return as_tensor
