"""Facts of the code that pages state: defaults, limits, sizes, and what is computed from them.

The source `code` of "figures" in shown.json. A key with dots is a constant of the package, such as
`fd_dsa.serve.body.MAX_DEPTH`; the others are the functions here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import cache, partial, reduce
from importlib import import_module
from typing import Any

from benchmarks._arrivals import lengths_table, rates_table
from benchmarks._harness import ROOT
from benchmarks._notes import siege_table
from benchmarks._published import GLM, V32, plan_lines, plan_of, plan_table
from fd_dsa import __version__
from fd_dsa.config import EngineConfig
from fd_dsa.engine import Tokenizer
from fd_dsa.models.registry import config_from_dict

_KIB, _MIB = 1 << 10, 1 << 20
# free memory of the machine that the start log of docs/operations.md is of
_FREE_BYTES = 23 << 30


@cache
def flags() -> dict[str, Any]:
    """Return the default of each flag, by its name with underscores."""
    from fd_dsa.serve.flags import DEFAULTS

    return {f.name: f.default for f in dataclasses.fields(EngineConfig)} | DEFAULTS


@cache
def start() -> dict[str, Any]:
    """Return the memory plan of a server on the demo model, and MiB of the stored weights."""
    from fd_dsa.engine.caches import caches_class
    from fd_dsa.models.mtp_layer import add_mtp_layer
    from fd_dsa.models.registry import open_checkpoint, read_config
    from fd_dsa.runner.input_batch import InputBatch
    from fd_dsa.startup.memory import plan_memory, weight_bytes

    config = EngineConfig().on_device("cpu")
    model = read_config(config.model_path)
    if config.speculation is not None and config.speculation.method == "mtp":
        with open_checkpoint(model, config.model_path) as checkpoint:
            model = add_mtp_layer(checkpoint, model)
    longest, config = model.max_position_embeddings, config.with_blocks(model.default_block_size)
    tokens = config.tokens_per_block
    batch = InputBatch(config.num_seqs, config.num_batched_tokens, -(-longest // tokens), tokens)
    plan = plan_memory(
        config,
        weight_bytes=weight_bytes(model),
        bytes_per_block=caches_class(model)(config, model, batch).bytes_per_block,
        max_model_len=longest,
        free_bytes=_FREE_BYTES,
    )
    stored = sum(path.stat().st_size for path in config.model_path.glob("*.safetensors"))
    return {
        "summary": plan.summary(),
        "model": f"{model.model_type} on the CPU, 2 threads: {model.num_hidden_layers} layers, "
        f"{config.dtype}, caches in {config.kv_cache_dtype}, index_topk {model.index_topk}, "
        f"max_model_len {longest}",
        "stored": f"{stored / _MIB:.1f} MiB",
    }


def other_flags() -> str:
    """Return a table of the flags of other servers, for docs/flags.md."""
    from fd_dsa.serve.known_flags import OTHER_NAMES, as_flag

    lines = ["| here | flags of other servers |", "|---|---|"]
    for here, names in OTHER_NAMES.items():
        ours, flags = here.replace(" or ", "` or `"), ", ".join(f"`{as_flag(n)}`" for n in names)
        lines.append(f"| `{ours}` | {flags} |")
    return "\n".join(lines) + "\n"


def start_log() -> str:
    """Return the log of a start on the demo model as a code block. Times are examples."""
    from fd_dsa.models.registry import read_config
    from fd_dsa.ops.providers import select_provider, unconditional
    from fd_dsa.serve.flags import ServerOptions
    from fd_dsa.serve.info import chat_formats

    config = EngineConfig()
    chat = chat_formats(Tokenizer.from_folder(config.model_path), ServerOptions())
    defaults = dict(read_config(config.model_path).generation)
    lines = [
        "engine embedded: no flag asks for FastDeploy",
        f"fd_dsa {__version__}: loading …/{config.model_path.name}",
        f"sampling defaults of generation_config.json: {defaults}",
        f"[1/5] config   {start()['model']}",
        f"[2/5] weights  {start()['stored']} read in 0.1 s",
        f"{', '.join(unconditional('cpu'))} on cpu: {select_provider('topk', 'cpu')}",
        f"[3/5] kv cache {start()['summary']}",
        "[4/5] warm-up  not needed on this device",
        f"chat: prompts by {chat['chat_template']}, tool calls {chat['tool_call_parser']}, "
        f"reasoning {chat['reasoning_parser']}",
        "[5/5] ready    in 0.9 s",
    ]
    text = "\n".join(f"07:05:09 INFO {line}" for line in lines)
    return f"```\n{text}\n```\n"


@cache
def makefile() -> dict[str, dict[str, str]]:
    """Return sizes of the installation by stamp, and the minutes of the tests.

    Each stamp has `download`, `disk` and `minutes`.
    """
    text = (ROOT / "Makefile").read_text("utf-8")
    form = (
        r"\.(\w+): SIZE := (?P<download>[\d.]+ GB) to download, (?P<disk>[\d.]+ GB) on disk, (.*)"
    )
    found = {
        m[1]: {"download": m["download"], "disk": m["disk"], "minutes": m[4]}
        for m in re.finditer(form, text)
    }
    minutes = re.search(r"about (\d+) minutes on 2 idle cores", text)
    assert minutes is not None, "Makefile: the target `test` says no minutes"
    return found | {"test": {"minutes": minutes[1]}}


@cache
def _model(name: str) -> dict[str, Any]:
    """Return sizes of a published model: parameters, and bytes in FP8 as a GPU holds them.

    Its layers with experts are alike, so two models of few layers give all sizes.
    """
    models = {"v32": V32, "glm": GLM, "reap": V32 | {"n_routed_experts": 128}}
    whole = models[name]
    dense = whole["first_k_dense_replace"]
    layers = whole["num_hidden_layers"] - dense
    few, more = (_cut(whole, dense + n) for n in (0, 1))
    layer = {key: more[key] - few[key] for key in few}
    sizes = {key: few[key] + layers * layer[key] for key in few}
    others = sizes["parameters"] - sizes["routed"]
    return sizes | {
        "moe_layer_bytes": layer["bytes"],
        "others": others,
        # tensor parallelism of 8, and what it leaves of a GPU; then 16 ranks with a part of the
        # routed experts each
        "bytes_of_8": sizes["bytes"] / 8,
        "left_of_8": 0.9 * 141e9 - sizes["bytes"] / 8,
        "bytes_of_16": sizes["routed"] / 16 + others,
        "ends_bytes": few["ends"],
    }


def _cut(config: dict[str, Any], layers: int) -> dict[str, float]:
    """Return sizes of a model cut to its first layers."""
    from fd_dsa.models.expected_tensors import expected_tensors
    from fd_dsa.models.loader import fp8_tensors
    from fd_dsa.startup.memory import weight_parts

    model = config_from_dict(config | {"num_hidden_layers": layers}, "config.json")
    parts = weight_parts(model, "bfloat16", fp8_tensors(None, model))
    counts = {n: tensor.num_elements for n, tensor in expected_tensors(model).items()}
    return {
        "parameters": sum(counts.values()),
        "routed": sum(count for n, count in counts.items() if ".experts." in n),
        "bytes": sum(parts.values()),
        "ends": parts["embedding"] + parts["head"],
    }


def softmax_scale() -> dict[str, float]:
    """Return the factor of the attention scores of each family."""

    models = {"v32": V32, "glm": GLM}
    return {name: config_from_dict(one, name).softmax_scale for name, one in models.items()}


@cache
def caches() -> dict[str, Any]:
    """Return bytes of a token and layer of DeepSeek-V3.2's caches, by cache format."""
    from fd_dsa.cache_formats import CACHE_FORMATS, CacheLayout

    found: dict[str, Any] = {}
    for kind in CACHE_FORMATS:
        layout = CacheLayout(kind, 64, 512, 64, 128)
        latent, both = (layout.bytes_per_block(1, n) // 64 for n in (0, 1))
        found[kind] = {"latent": latent, "index": both - latent, "both": both}
    fp8 = found["fp8_ds_mla"]["both"]
    layers = V32["num_hidden_layers"]
    return found | {
        "more_than_float32": found["float32"]["both"] / fp8,
        "block_of_v32": 64 * layers * fp8,
        "token_of_v32": layers * fp8,
        "tokens_of_10_gb": 10e9 / (layers * fp8),
    }


@cache
def v4() -> dict[str, float]:
    """Bytes of DeepSeek-V4-Flash's pools, on a CPU in float32."""
    from fd_dsa.cache_formats import V4CacheLayout
    from fd_dsa.models.config_reader import FieldReader
    from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
    from fd_dsa.models.registry import FAMILIES
    from fd_dsa.v4_attention.device_pools import DeviceLayout

    def config_of(*ratios: int) -> DeepseekV4Config:
        # the last ratio belongs to the layer that drafts
        fields = {"compress_ratios": [*ratios, 0], "num_hidden_layers": len(ratios)}
        reader = FieldReader(fields, "config.json")
        return DeepseekV4Config.read(reader, FAMILIES["deepseek_v4"].defaults)

    def layout(*ratios: int) -> V4CacheLayout:
        return config_of(*ratios).cache_layout("float32", 128)

    flash = [0, 0, *([4, 128] * 20), 4]
    config = config_of(*flash)
    window = layout(0).bytes_per_block() // 128
    csa, hca = layout(4), layout(128)
    record = 4 * 2 * (config.head_dim + config.index_head_dim) * 4
    records = record * flash.count(4)
    windows = window * len(flash)
    on_a_device = {
        f"{kind}_token": DeviceLayout(config, dtype, 256).bytes_per_block() / 256
        for kind, dtype in (("bfloat16", "bfloat16"), ("fp8", "fp8_ds_mla"))
    }
    return on_a_device | {
        "window": window,
        "windows": windows,
        "entries": (layout(*flash).bytes_per_block() - records) / 128 - windows,
        "record": record,
        "records": records,
        "csa_state": csa.bytes_per_row(),
        "hca_state": hca.bytes_per_row(),
        "states": layout(*flash).bytes_per_row(),
    }


@cache
def all_reduce() -> dict[str, float]:
    """Return the bytes, and rows of DeepSeek-V3.2, from which an all-reduce has two stages."""
    source = (ROOT / "custom_ops/csrc/all_reduce.cu").read_text("utf-8")
    least = re.search(r"kMinSavedBytes = (\d+) << 10", source)
    assert least is not None, "all_reduce.cu: no kMinSavedBytes"
    found = {}
    for ranks in (4, 8):
        # one stage sends ranks - 1 times the rows, two send 2 (ranks - 1) / ranks times
        less = (ranks - 1) * (1 - 2 / ranks)
        found[f"kib_{ranks}"] = int(least[1]) / less
    rows = found["kib_4"] * _KIB / (2 * V32["hidden_size"])
    return found | {"rows_4": -(-rows // 1)}


def indexer() -> dict[str, int]:
    """Return bytes of the indexer's projections of a layer of DeepSeek-V3.2 in bfloat16."""
    return {"layer": 2 * (V32["index_head_dim"] + V32["index_n_heads"]) * V32["hidden_size"]}


def accept_retries() -> float:
    """Return the accept attempts per second after a lack of descriptors or memory."""
    from fd_dsa.serve import listener

    return 1 / listener._RETRY_S


def grammars_most_s() -> float:
    """Return the maximum seconds for which an unused grammar is kept: two sweeps."""
    from fd_dsa.engine import grammar

    return 2 * grammar.KEPT_FOR_S


def unseen_541() -> float:
    """Return the share of flipping prompts that 541 prompts without a flip allow."""
    from fd_dsa.accuracy.stats import max_unseen_share

    return max_unseen_share(541)


def siege() -> dict[str, float]:
    """Return bounds of the siege."""
    from tests.soak.siege import FULL

    return dataclasses.asdict(FULL)


def descriptors() -> int:
    """Return file descriptors that the server keeps from connections."""
    from fd_dsa.serve import listener

    return listener._KEPT_DESCRIPTORS + listener.PROBE_CONNECTIONS


class _Code(dict[str, Any]):
    """The functions above by name, and constants of modules and classes by their full names."""

    def __missing__(self, key: str) -> Any:
        parts = key.split(".")
        if len(parts) == 1:
            raise KeyError(f"{key!r} is no fact; there are {', '.join(self)}")
        # a constant belongs to the module or to one of its classes
        for end in (-1, -2):
            with contextlib.suppress(ImportError):
                module = import_module(".".join(parts[:end]))
                try:
                    return reduce(getattr, parts[end:], module)
                except AttributeError as error:
                    raise KeyError(str(error)) from error
        raise KeyError(f"{key!r}: there is no such module")


FACTS: Mapping[str, Any] = _Code(
    flags=flags,
    start=start,
    makefile=makefile,
    v32=lambda: _model("v32"),
    glm=lambda: _model("glm"),
    reap=lambda: _model("reap"),
    softmax_scale=softmax_scale,
    caches=caches,
    v4=v4,
    v4_plan=lambda: plan_of("DeepSeek-V4-Flash", 4)["caches"]["fp8_ds_mla"],
    all_reduce=all_reduce,
    indexer=indexer,
    accept_retries=accept_retries,
    grammars_most_s=grammars_most_s,
    unseen_541=unseen_541,
    siege=siege,
    descriptors=descriptors,
)

REGIONS: dict[str, Callable[[], str]] = {
    "load_lengths": lengths_table,
    "load_rates": rates_table,
    "other_flags": other_flags,
    "siege_table": lambda: siege_table([*siege().values()][:6]),
    "start_log": start_log,
    "plan_lines": plan_lines,
    "plan_table": plan_table,
    "plan_table_zh": partial(plan_table, ("模型", "GPU 数", "每张 GPU 的权重"), "否"),
}
"""Regions of the pages that show no result, or several: name -> its text."""
