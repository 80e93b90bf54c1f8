"""What the backend reads of FastDeploy's ForwardMeta, and what it writes there beside the step.

Source of the fields: FastDeploy's `model_executor/forward_meta.py`; of `max_len_tensor_cpu`,
`custom_ops/gpu_ops/append_attn/get_block_shape_and_split_kv_block.cu`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from fd_dsa.errors import MissingStepError

_INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")


def step_rows(forward_meta: Any) -> list[Any]:
    """Lengths int32 [B], three of them, and block tables int32 [B, M] of the rows of a step.

    Trees give all slots, `[S]` or `[S, 1]`, or the running rows, `[B]`, and not the same for all
    four: B is the smallest. Views, nothing is copied.

    Raises:
        MissingStepError: one of them is None.
    """
    arrays = [getattr(forward_meta, name, None) for name in _INPUTS]
    for index, (name, array) in enumerate(zip(_INPUTS, arrays, strict=True)):
        if array is None:
            raise MissingStepError(
                f"forward_meta.{name} is None: the runner's initialize_forward_meta must fill it "
                "before init_attention_metadata"
            )
        if name != "block_tables" and len(array.shape) > 1:
            arrays[index] = array.reshape([-1])
    rows = min(int(array.shape[0]) for array in arrays)
    return [array if array.shape[0] == rows else array[:rows] for array in arrays]


def fill_max_lens(
    max_len_tensor_cpu: Any, num_tokens: int, has_prefill: bool, tokens_per_row: int, max_keys: int
) -> None:
    """Write upper bounds of a step's maxima, which the host knows, instead of reading them back.

    Entries: this_time, encoder, decoder, decoder + this_time, decoder of decode rows, keys of rows
    with cached ones. Entries past the sixth are other trees' own and stay as they are. Written at
    the tensor's address: with NumPy before 2.2.5, or Paddle before 3.3, views are read-only.

    Args:
        max_len_tensor_cpu: int32 [n], contiguous, in host memory, pinned or not.
        num_tokens: launched tokens of the step; 0 makes all entries 0.
        has_prefill: whether a prefill row may be there; without one the second entry is 0.
        tokens_per_row: of a decode row, at most.
        max_keys: of a row, at most.
    """
    longest = num_tokens if has_prefill else min(num_tokens, tokens_per_row)
    keys = max_keys if num_tokens else 0
    values = (longest, num_tokens if has_prefill else 0, keys, keys, keys, keys)
    count = min(len(values), int(max_len_tensor_cpu.shape[0]))
    memory = (ctypes.c_int32 * count).from_address(max_len_tensor_cpu.data_ptr())
    memory[:] = values[:count]
