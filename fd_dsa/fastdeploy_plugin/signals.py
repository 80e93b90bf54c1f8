"""Prefill-decode disaggregation: the calls by which FastDeploy's DSA backend announces a step.

FastDeploy's cache messenger of the prefill node waits for them before it sends blocks on.

Source: FastDeploy's `layers/attention/dsa_attention_backend.py` (`init_attention_metadata` and
`forward_mixed`) and the operators in `layers/attention/ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fd_dsa.errors import BackendUnavailable
from fd_dsa.fastdeploy_plugin.tree_checks import ATTENTION

PER_CHUNK, PER_QUERY = "per_chunk", "per_query"
_OPERATORS = {
    PER_CHUNK: ("init_kv_signal_per_query",),
    PER_QUERY: ("open_shm_and_get_meta_signal", "init_signal_layerwise"),
}


class KvSignals:
    """The notes of one backend; without disaggregation there are none.

    Args:
        backend: the object that has FastDeploy's attributes `pd_disaggregation_mode`, `rank`,
            `device_id`, `num_layers`, `num_layers_draft_model`, `start_layer_index` and
            `keep_pd_step_flag`.

    Raises:
        BackendUnavailable: the tree lacks an operator of the mode that is asked for.
    """

    def __init__(self, backend: Any) -> None:
        self._of = backend
        self._mode = backend.pd_disaggregation_mode
        self._call: dict[str, Callable[..., Any]] = {}
        for name in _OPERATORS.get(self._mode, ()):
            operator = getattr(import_module(f"{ATTENTION}.ops"), name, None)
            if operator is None:
                raise BackendUnavailable(
                    f"pd_disaggregation_mode: got {self._mode!r}, this FastDeploy has no operator "
                    f"{name}; start it without splitwise roles"
                )
            self._call[name] = operator

    def begin_step(self, metadata: Any, forward_meta: Any) -> None:
        """Announce a step.

        Args:
            metadata: FastDeploy's record of the step, whose `kv_signal_*` fields are set.
            forward_meta: its lengths, and whether it is a dummy run, which is not announced by
                chunk.
        """
        of = self._of
        metadata.kv_signal_data_list = [None] * of.num_layers
        if self._mode == PER_CHUNK:
            dummy = getattr(forward_meta, "is_dummy_or_profile_run", False)
            if not of.keep_pd_step_flag and not dummy:
                self._call["init_kv_signal_per_query"](
                    forward_meta.seq_lens_encoder,
                    forward_meta.seq_lens_this_time,
                    forward_meta.seq_lens_decoder,
                    of.rank,
                    of.num_layers + of.num_layers_draft_model,
                )
        elif self._mode == PER_QUERY:
            metadata.kv_signal_metadata = self._call["open_shm_and_get_meta_signal"](
                of.rank, int(of.device_id), of.keep_pd_step_flag
            )

    def begin_layer(self, metadata: Any, layer_id: int) -> None:
        """Announce a layer, before its keys are written."""
        if self._mode == PER_QUERY:
            metadata.kv_signal_data_list[layer_id] = self._call["init_signal_layerwise"](
                metadata.kv_signal_metadata, layer_id + self._of.start_layer_index
            )
