"""Steps between FastDeploy and the backend: rows, their bounds, and signals of disaggregation.

In prefill-decode disaggregation FastDeploy's cache messenger of a prefill node waits for the calls
of `begin_step` and `begin_layer` before it sends blocks on.

Source of the fields: FastDeploy's `model_executor/forward_meta.py`; of `max_len_tensor_cpu`,
`custom_ops/gpu_ops/append_attn/get_block_shape_and_split_kv_block.cu`; of the calls,
`layers/attention/dsa_attention_backend.py` and the operators in `layers/attention/ops`.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

from fd_dsa.attention.step_arrays import step_inputs
from fd_dsa.errors import BackendUnavailable
from fd_dsa.fastdeploy_plugin.tree_checks import ATTENTION
from fd_dsa.fastdeploy_plugin.upstream import AttentionBackend, AttentionRecord, ForwardMeta
from fd_dsa.tensor import Tensor

PER_CHUNK, PER_QUERY = "per_chunk", "per_query"
OPERATORS = {
    PER_CHUNK: ("init_kv_signal_per_query",),
    PER_QUERY: ("open_shm_and_get_meta_signal", "init_signal_layerwise"),
}


def step_rows(forward_meta: ForwardMeta) -> list[Any]:
    """Return the three lengths int32 [B] and the block tables int32 [B, M] of a step's rows.

    Trees have arrays of all slots, `[S]` or `[S, 1]`, or of the running rows, `[B]`, and may mix
    both. B is the smallest number of rows. The results are views.

    Raises:
        MissingStepError: an array is None.
    """
    *lengths, tables = step_inputs(forward_meta)
    arrays = [*(x.reshape([-1]) if len(x.shape) > 1 else x for x in lengths), tables]
    rows = min(int(array.shape[0]) for array in arrays)
    return [array if array.shape[0] == rows else array[:rows] for array in arrays]


def fill_max_lens(
    max_len_tensor_cpu: Tensor,
    num_tokens: int,
    has_prefill: bool,
    tokens_per_row: int,
    max_keys: int,
) -> None:
    """Write upper bounds of a step's maxima, which the host knows without a read-back.

    Entries: this_time, encoder, decoder, decoder + this_time, decoder of decode rows, keys of rows
    with cached tokens. Entries after the sixth belong to other trees and stay as they are. The
    function writes to the tensor's address, because views are read-only with NumPy before 2.2.5 and
    with Paddle before 3.3.

    Args:
        max_len_tensor_cpu: int32 [n], contiguous, in host memory, pinned or not.
        num_tokens: tokens of the step.
        has_prefill: True if the step may have a prefill row.
        tokens_per_row: max tokens of a decode row.
        max_keys: max keys of a row.
    """
    longest = num_tokens if has_prefill else min(num_tokens, tokens_per_row)
    keys = max_keys if num_tokens else 0
    values = (longest, num_tokens if has_prefill else 0, keys, keys, keys, keys)
    count = min(len(values), int(max_len_tensor_cpu.shape[0]))
    memory = (ctypes.c_int32 * count).from_address(max_len_tensor_cpu.data_ptr())
    # ctypes accepts any sequence
    memory[:] = values[:count]  # type: ignore[call-overload]


def check_operators(mode: str) -> None:
    """Raise BackendUnavailable for a mode of disaggregation without its operators."""
    for name in OPERATORS.get(mode, ()):
        if not hasattr(import_module(f"{ATTENTION}.ops"), name):
            raise BackendUnavailable(
                f"pd_disaggregation_mode: got {mode!r}, this FastDeploy has no operator {name}; "
                "start it without splitwise roles"
            )


def begin_step(of: AttentionBackend, metadata: AttentionRecord, forward_meta: ForwardMeta) -> None:
    """Announce a step to the messenger, and set the `kv_signal_*` fields of FastDeploy's record.

    A dummy run is not announced by chunk.
    """
    metadata.kv_signal_data_list = [None] * of.num_layers
    dummy = getattr(forward_meta, "is_dummy_or_profile_run", False)
    if of.pd_disaggregation_mode == PER_CHUNK and not of.keep_pd_step_flag and not dummy:
        import_module(f"{ATTENTION}.ops").init_kv_signal_per_query(
            forward_meta.seq_lens_encoder,
            forward_meta.seq_lens_this_time,
            forward_meta.seq_lens_decoder,
            of.rank,
            of.num_layers + of.num_layers_draft_model,
        )
    elif of.pd_disaggregation_mode == PER_QUERY:
        open_signal = import_module(f"{ATTENTION}.ops").open_shm_and_get_meta_signal
        metadata.kv_signal_metadata = open_signal(of.rank, int(of.device_id), of.keep_pd_step_flag)


def begin_layer(of: AttentionBackend, metadata: AttentionRecord, layer_id: int) -> None:
    """Announce a layer to the messenger, before its keys are written."""
    if of.pd_disaggregation_mode == PER_QUERY:
        init_signal = import_module(f"{ATTENTION}.ops").init_signal_layerwise
        metadata.kv_signal_data_list[layer_id] = init_signal(
            metadata.kv_signal_metadata, layer_id + of.start_layer_index
        )
