"""Where the double's names, arguments and orders come from: FastDeploy's public files by commit.

A commit is that of the newest version that was read, below "older" that of one readable version:
what the double takes from those (a name, a loader, a flag) is what newer callers use.
"""

from __future__ import annotations

SOURCES = {
    # June 2026
    "worker/gpu_model_runner.py": "39d329f2",
    "worker/input_batch.py": "39d329f2",
    "spec_decode/mtp.py": "39d329f2",
    "layers/attention/dsa_attention_backend.py": "39d329f2",
    "cache_manager/v1/cache_controller.py": "39d329f2",
    # April and May 2026
    "models/deepseek_v3.py": "8f8e7cf6",
    "model_executor/forward_meta.py": "8f8e7cf6",
    "spec_decode/mtp_cuda.py": "177cb140",
    "layers/quantization/block_wise_fp8.py": "034a3bc7",
    "layers/attention/base_attention_backend.py": "3468976b",
    "layers/attention/mla_attention_backend.py": "d14f8c28",
    "layers/attention/append_attn_backend.py": "c6a1dbac",
    "model_executor/layers/normalization.py": "0009064e",
    "model_executor/layers/rotary_embedding.py": "09ad396c",
    "fastdeploy/config.py": "acfda944",
    "fastdeploy/envs.py": "3c9ff068",
    "worker/gpu_worker.py": "60b02710",
    # older
    "layers/attention/attention.py": "19c7930d",
    "layers/attention/attention_selecter.py": "bc403a03",
    "layers/attention/__init__.py": "f86e7bad",
    "model_executor/layers/linear.py": "c093927a",
    "model_executor/pre_and_post_process.py": "4097f050",
    "graph_optimization/cudagraph_piecewise_backend.py": "19c7930d",
    "graph_optimization/decorator.py": "d3f4a2f2",
    "graph_optimization/graph_optimization_backend.py": "f19c7274",
    "model_executor/models/__init__.py": "e1f30733",
    "model_executor/models/model_base.py": "0a0571c5",
    "platforms/base.py": "ae24353a",
    "platforms/cuda.py": "3a7218b6",
    "plugins/__init__.py": "827c5252",
    "plugins/model_register/__init__.py": "00207aae",
    "plugins/model_runner/__init__.py": "76eb06fe",
    "plugins/utils.py": "fa9f8a9b",
    "spec_decode/ngram.py": "76eb06fe",
}
"""The end of a file's path -> the first digits of the commit."""

UNREAD = (
    "engine/request.py",
    "entrypoints/openai/api_server.py",
    "layers/attention/utils.py",
    "model_executor/layers/embeddings.py",
    "model_executor/layers/lm_head.py",
    "model_executor/layers/moe/moe.py",
    "model_executor/layers/utils.py",
    "model_executor/load_weight_utils.py",
    "fastdeploy/utils.py",
    "custom_ops/gpu_ops",
)
"""Files of which no version of 2026 was read as a whole; names are those that callers use."""
