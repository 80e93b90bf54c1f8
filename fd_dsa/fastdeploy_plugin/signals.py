"""Prefill-decode disaggregation: the calls by which FastDeploy's DSA backend announces a step.

FastDeploy's cache messenger of the prefill node waits for them before it sends blocks on.

Source: FastDeploy's `layers/attention/dsa_attention_backend.py` (`init_attention_metadata` and
`forward_mixed`) and the operators in `layers/attention/ops`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fd_dsa.errors import BackendUnavailable
from fd_dsa.fastdeploy_plugin.tree_checks import ATTENTION

PER_CHUNK, PER_QUERY = "per_chunk", "per_query"
_OPERATORS = {
    PER_CHUNK: ("init_kv_signal_per_query",),
    PER_QUERY: ("open_shm_and_get_meta_signal", "init_signal_layerwise"),
}


def check_operators(mode: str) -> None:
    """Refuse a mode of disaggregation whose operators the tree lacks.

    Raises:
        BackendUnavailable: names the mode and the operator.
    """
    for name in _OPERATORS.get(mode, ()):
        if not hasattr(import_module(f"{ATTENTION}.ops"), name):
            raise BackendUnavailable(
                f"pd_disaggregation_mode: got {mode!r}, this FastDeploy has no operator {name}; "
                "start it without splitwise roles"
            )


def begin_step(of: Any, metadata: Any, forward_meta: Any) -> None:
    """Announce a step.

    Args:
        of: the backend, with FastDeploy's attributes.
        metadata: FastDeploy's record of the step, whose `kv_signal_*` fields are set.
        forward_meta: its lengths, and whether it is a dummy run, which is not announced by chunk.
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


def begin_layer(of: Any, metadata: Any, layer_id: int) -> None:
    """Announce a layer, before its keys are written."""
    if of.pd_disaggregation_mode == PER_QUERY:
        init_signal = import_module(f"{ATTENTION}.ops").init_signal_layerwise
        metadata.kv_signal_data_list[layer_id] = init_signal(
            metadata.kv_signal_metadata, layer_id + of.start_layer_index
        )
