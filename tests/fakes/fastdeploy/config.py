"""FDConfig: what every class of FastDeploy is made from (`fastdeploy/config.py`).

Each part is a plain namespace with the fields that a DSA model, its runner and its backend read.
`fd_config` fills them from a Hugging Face config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastdeploy import _tree, envs


@dataclass
class FDConfig:
    """The parts of the configuration; attributes are FastDeploy's names."""

    model_config: Any
    cache_config: Any
    parallel_config: Any
    speculative_config: Any
    scheduler_config: Any
    graph_opt_config: Any
    load_config: Any
    quant_config: Any = None

    def get_max_chunk_tokens(self) -> int:
        """Most tokens of one request in a step."""
        if self.cache_config.enable_chunked_prefill:
            return self.scheduler_config.max_num_batched_tokens
        return self.model_config.max_model_len

    @property
    def enable_rope_3d_runtime(self) -> bool:
        return False


def fd_config(model_folder: str | Path, **overrides: Any) -> FDConfig:
    """The configuration of a checkpoint's folder.

    Args:
        model_folder: has a config.json.
        overrides: values of fields by name, in the first part that has the field;
            `tensor_parallel_size=2`, `max_num_seqs=4`.

    Raises:
        KeyError: no part has a field of such a name.
    """
    checkpoint = json.loads((Path(model_folder) / "config.json").read_text("utf-8"))
    config = FDConfig(
        model_config=_model(checkpoint),
        **_defaults(),
    )
    config.model_config.model = str(model_folder)
    for name, value in overrides.items():
        parts = [part for part in vars(config).values() if hasattr(part, name)]
        if not parts:
            raise KeyError(f"fd_config: no part of the configuration has a field {name!r}")
        setattr(parts[0], name, value)
    _settle(config)
    return config


def _settle(config: FDConfig) -> None:
    """Fields that follow from others."""
    graphs, model = config.graph_opt_config, config.model_config
    graphs.cudagraph_capture_sizes = sorted(graphs.cudagraph_capture_sizes, reverse=True)
    graphs.max_capture_size = graphs.cudagraph_capture_sizes[0]
    graphs.real_shape_to_captured_size = {
        size: min(one for one in graphs.cudagraph_capture_sizes if one >= size)
        for size in range(graphs.max_capture_size + 1)
    }
    model.max_model_len = min(model.max_model_len, model.max_position_embeddings)
    config.parallel_config.use_ep = config.parallel_config.expert_parallel_size > 1


def _model(checkpoint: dict[str, Any]) -> Any:
    """All fields of config.json as they are, and FastDeploy's own."""
    heads, hidden = checkpoint["num_attention_heads"], checkpoint["hidden_size"]
    rope = checkpoint.get("rope_parameters")
    own = {
        "dtype": "float32",
        # FastDeploy's own head_dim has nothing to do with MLA's
        "head_dim": checkpoint.get("head_dim") or hidden // heads,
        "max_model_len": checkpoint["max_position_embeddings"],
        "rope_theta": checkpoint.get("rope_theta") or (rope or {}).get("rope_theta", 10000.0),
        "rope_scaling": checkpoint.get("rope_scaling"),
        "rope_parameters": rope,
        "ori_vocab_size": checkpoint["vocab_size"],
        "start_layer_index": 0,
        "causal": True,
    }
    return SimpleNamespace(**checkpoint | own)


def _defaults() -> dict[str, Any]:
    """The parts that a checkpoint does not decide."""
    return {
        "cache_config": SimpleNamespace(
            block_size=64,
            total_block_num=32,
            enc_dec_block_num=envs.FD_ENC_DEC_BLOCK_NUM,
            enable_chunked_prefill=not envs.FD_DISABLE_CHUNKED_PREFILL,
            cache_dtype="bfloat16",
        ),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1,
            tensor_parallel_rank=0,
            expert_parallel_size=1,
            data_parallel_rank=0,
            pd_disaggregation_mode="None",
            device_ids="0",
        ),
        # one draft token without a method: code that adds one to it is used to that
        "speculative_config": SimpleNamespace(
            method=None, num_speculative_tokens=1, model_type="main"
        ),
        "scheduler_config": SimpleNamespace(
            max_num_seqs=8,
            max_num_batched_tokens=512,
            enable_overlap_schedule=_tree.current().overlap_schedule,
        ),
        "graph_opt_config": SimpleNamespace(
            use_cudagraph=False,
            graph_opt_level=0,
            full_cuda_graph=True,
            cudagraph_capture_sizes=[8, 4, 2, 1],
            cudagraph_capture_sizes_prefill=[64, 32],
            cudagraph_num_of_warmups=1,
        ),
        "load_config": SimpleNamespace(load_choices="default_v1", dynamic_load_weight=False),
    }
