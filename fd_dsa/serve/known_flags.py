"""Flags of other servers, and the effect of each on this server's command line.

A flag of this module is removed from the command line if it changes no answer. Otherwise it is
refused with the flag of this server for the same purpose. docs/flags.md lists the flags that have
another name here.

Sources: `vllm serve --help`, `python -m sglang.launch_server --help`, and `EngineArgs` of
FastDeploy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fd_dsa.errors import ConfigError, shorten, shorten_text


class Known(NamedTuple):
    """A flag of another server.

    Attributes:
        reason: why the flag is not needed, or "" for a flag that is always refused.
        refusal: what to do instead, or "" for a flag that is never refused.
        takes_value: True for a flag with a value, after "=" or in the next word.
        neutral: accepted values, for a flag that refuses the others.
    """

    reason: str
    refusal: str
    takes_value: bool = False
    neutral: tuple[str, ...] = ()


NOT_NEEDED: Mapping[str, tuple[str, ...]] = {
    "no code of a model's folder runs": ("trust-remote-code",),
    "the folder determines tokenizer and template": (
        *("tokenizer-mode=auto|hf|fast|deepseek_v32|deepseek_v4", "config-format=auto|hf"),
        *("chat-template-content-format=auto|string", "response-role=assistant"),
    ),
    "models of this server generate text": (
        *("task=auto|generate", "runner=auto|generate", "convert=auto|none", "model-impl=auto"),
        *("limit-mm-per-prompt=", "mm-processor-kwargs=", "mm-processor-cache-gb="),
        *("media-io-kwargs=", "allowed-local-media-path=", "allowed-media-domains="),
        *("interleave-mm-strings", "disable-mm-preprocessor-cache", "skip-mm-profiling"),
        *("language-model-only", "disable-chunked-mm-input"),
    ),
    "--download takes the main revision": (
        *("revision=main", "tokenizer-revision=main", "code-revision=main"),
    ),
    "the server has one way to read weights": (
        *("safetensors-load-strategy=", "model-loader-extra-config=", "use-tqdm-on-load"),
        *("max-parallel-loading-workers=", "ignore-patterns=", "load-choices=default|default_v1"),
        *("weight-loader-disable-mmap",),
    ),
    "answers are parsed for tool calls and reasoning if the template has them": (
        *("enable-auto-tool-choice", "enable-reasoning"),
    ),
    "llguidance always enforces structured output": (
        "guided-decoding-backend=auto|guidance|llguidance|xgrammar|outlines|off",
        "grammar-backend=auto|llguidance|xgrammar|outlines",
        "guided-decoding-disable-fallback",
    ),
    "every answer has this": (
        *("enable-prompt-tokens-details", "enable-request-id-headers", "enable-cache-report"),
        "enable-logprob",
    ),
    "metrics are at /metrics of --port": (
        *("enable-metrics", "metrics-port=", "show-hidden-metrics-for-version="),
        *("kv-cache-metrics", "cudagraph-metrics", "enable-server-load-tracking"),
        *("enable-mfu-metrics", "decode-log-interval="),
    ),
    "the log is short; --log-level warning keeps only warnings and errors": (
        *("disable-log-requests", "disable-log-stats", "disable-uvicorn-access-log"),
        *("disable-access-log-for-endpoints=", "max-log-len=", "aggregate-engine-logging"),
        *("log-level-http=", "uvicorn-log-level="),
    ),
    "evicted prefix blocks are copied in one way": (
        *("kv-offloading-backend=native", "hicache-write-policy=", "hicache-io-backend="),
        "hicache-mem-layout=",
    ),
    "the scheduler lacks this option": (
        *("swap-space=", "cpu-offload-gb=0", "preemption-mode=recompute", "stream-interval=1"),
        *("scheduling-policy=fcfs", "schedule-policy=fcfs|lpm", "schedule-conservativeness="),
        *("num-scheduler-steps=1", "num-lookahead-slots=", "multi-step-stream-outputs"),
        *("scheduler-delay-factor=0|0.0", "use-v2-block-manager", "enable-mixed-chunk"),
        *("max-num-partial-prefills=", "max-long-partial-prefills=", "disable-async-output-proc"),
        *("long-prefill-token-threshold=", "disable-hybrid-kv-cache-manager"),
        *("prefix-caching-hash-algo=", "calculate-kv-scales", "disable-overlap-schedule"),
        "num-continuous-decode-steps=",
    ),
    "the server selects kernels at the start; FD_DSA_OP_PROVIDER selects others": (
        *("attention-backend=", "prefill-attention-backend=", "decode-attention-backend="),
        *("nsa-prefill-backend=", "nsa-decode-backend=", "dsa-prefill-backend="),
        *("dsa-decode-backend=", "sampling-backend=", "moe-runner-backend=", "moe-backend="),
        *("fp8-gemm-backend=", "moe-a2a-backend=none", "all2all-backend=", "enable-flashinfer"),
        *("disable-cascade-attn", "disable-sliding-window", "enable-dbo", "enable-flashinfer-mla"),
        *("enable-torch-compile", "compilation-config=", "optimization-level="),
        *("graph-optimization-config=", "use-cudagraph", "max-seq-len-to-capture="),
        *("disable-custom-all-reduce", "enable-p2p-check", "-cc=", "-O0", "-O1", "-O2", "-O3"),
    ),
    "the server starts its own processes on this machine": (
        *("distributed-executor-backend=mp|uni", "data-parallel-backend=mp", "nnodes=1"),
        *("node-rank=0", "pipeline-parallel-size=1", "-pp=1", "pp-size=1", "ep-size=1"),
        *("dp-size=1", "-dp=1", "dp=1", "-dcp=1"),
        *("decode-context-parallel-size=1", "prefill-context-parallel-size=1"),
        *("api-server-count=", "disable-frontend-multiprocessing", "workers=", "master-addr="),
        *("master-port=", "dist-init-addr=", "nccl-port=", "base-gpu-id=0", "watchdog-timeout="),
        *("engine-worker-queue-port=", "cache-queue-port=", "controller-port="),
        *("skip-server-warmup", "use-warmup=", "tokenizer-worker-num="),
    ),
    "request heads have fixed bounds (docs/operations.md)": (
        *("h11-max-incomplete-event-size=", "h11-max-header-count="),
    ),
    "generation_config.json gives the defaults": ("sampling-defaults=model",),
}
"""Flags that change no answer, by reason.

A flag is `name`, `name=` with any value, or `name=a|b` with one of these values.
"""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "--model": ("model-path",),
    "--tokenizer": ("tokenizer-path",),
    "--max-model-len": ("context-length",),
    "--max-num-seqs": ("max-running-requests",),
    "--max-num-batched-tokens": ("chunked-prefill-size", "max-prefill-tokens"),
    "--gpu-memory-utilization": ("mem-fraction-static",),
    "--kv-cache-memory-bytes or --num-gpu-blocks-override": ("max-total-tokens", "kv-cache-ratio"),
    "--kv-offload-bytes": (
        *("kv-offloading-size", "enable-hierarchical-cache", "hicache-size", "hicache-ratio"),
    ),
    "--block-size": ("page-size",),
    "--no-enable-prefix-caching": ("disable-radix-cache",),
    "--enforce-eager": ("disable-cuda-graph",),
    "--cudagraph-capture-sizes": (
        *("cuda-graph-bs", "cuda-graph-max-bs", "max-cudagraph-capture-size"),
    ),
    "--tensor-parallel-size": ("tp", "tp-size"),
    "--data-parallel-size": ("-dp", "dp", "data-parallel-size-local"),
    "--enable-expert-parallel": ("-ep", "ep", "enable-ep-moe", "expert-parallel-size"),
    "--speculative-config": (
        *("-sc", "speculative-model", "num-speculative-tokens", "speculative-algorithm"),
        *("speculative-num-steps", "speculative-eagle-topk", "speculative-num-draft-tokens"),
        *("speculative-draft-model-path", "ngram-prompt-lookup-max"),
        "ngram-prompt-lookup-min",
    ),
    "--seed": ("random-seed",),
    "--log-requests": ("enable-log-requests",),
}
"""Names that other servers have for the same or the nearest flag, by the flag of this server."""

REFUSED: Mapping[str, tuple[str, ...]] = {
    "config.json determines the form of the weights; give the folder of a quantised model": (
        *("quantization", "-q", "torchao-config", "quantization-param-path"),
    ),
    "config.json determines the model; change that file in a copy of the folder": (
        *("hf-overrides", "json-model-override-args", "rope-scaling", "rope-theta"),
        *("override-attention-dtype", "override-neuron-config", "hf-config-path"),
    ),
    "edit generation_config.json in a copy of the folder, or send the fields with each request": (
        *("override-generation-config", "preferred-sampling-params"),
    ),
    "send chat_template_kwargs with each request": ("default-chat-template-kwargs",),
    "--generation-config vllm leaves out what generation_config.json proposes": (
        "sampling-defaults",
    ),
    "download another revision yourself and give its folder": (
        *("revision", "tokenizer-revision", "code-revision"),
    ),
    "set the variable HF_HOME": ("download-dir",),
    "set the variable HF_TOKEN": ("hf-token",),
    "adapters are not supported": (
        *("enable-lora", "lora-modules", "lora-paths", "max-loras", "max-lora-rank", "lora-dtype"),
        *("max-cpu-loras", "fully-sharded-loras", "lora-backend", "max-loras-per-batch"),
        *("enable-prompt-adapter", "qlora-adapter-name-or-path"),
    ),
    "the server loads no code from outside of the package": (
        *("tool-parser-plugin", "reasoning-parser-plugin", "tool-server", "middleware"),
        *("logits-processors", "logits-processor-pattern", "worker-cls", "scheduler-cls"),
        *("worker-extension-cls", "io-processor-plugin", "enable-custom-logit-processor"),
    ),
    "TLS, CORS, sockets and paths belong to a proxy in front (docs/operations.md)": (
        *("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers"),
        *("enable-ssl-refresh", "ssl-keyfile-password", "allowed-origins", "allowed-methods"),
        *("allowed-headers", "allow-credentials", "uds", "root-path", "disable-fastapi-docs"),
        *("admin-api-key", "headless"),
    ),
    "the embedded engine serves on one machine; several need FastDeploy (docs/fastdeploy.md)": (
        *("pipeline-parallel-size", "-pp", "pp-size", "nnodes", "node-rank", "ep-size", "dp-size"),
        *("decode-context-parallel-size", "-dcp", "prefill-context-parallel-size", "ips"),
        *("distributed-executor-backend", "data-parallel-backend", "data-parallel-rank"),
        *("data-parallel-start-rank", "data-parallel-address", "data-parallel-rpc-port"),
        *("data-parallel-hybrid-lb", "data-parallel-external-lb", "enable-dp-attention"),
        *("enable-eplb", "eplb-config", "num-redundant-experts", "moe-a2a-backend", "base-gpu-id"),
        *("kv-transfer-config", "kv-events-config", "ec-transfer-config", "disaggregation-mode"),
        *("splitwise-role", "innode-prefill-ports", "rdma-comm-ports", "pd-comm-port"),
    ),
    "weights and the blocks of running requests stay in device memory": (
        *("cpu-offload-gb", "preemption-mode", "enable-sleep-mode", "enable-memory-saver"),
        "dynamic-load-weight",
    ),
    "prefix blocks are in device memory and, with --kv-offload-bytes, in host memory": (
        *("kv-offloading-backend", "enable-lmcache", "hicache-storage-backend"),
    ),
    "requests run in the order in which they arrive": (
        *("scheduling-policy", "schedule-policy", "num-scheduler-steps", "scheduler-delay-factor"),
        *("stream-interval", "enable-priority-scheduling"),
    ),
    "models of this server handle only text": (
        *("task", "runner", "convert", "model-impl", "is-embedding", "pooler-config", "enable-mm"),
        *("enable-multimodal", "skip-tokenizer-init", "enable-prompt-embeds", "tokens-only"),
    ),
    "the server has one way to read a folder": (
        *("tokenizer-mode", "config-format", "load-choices", "chat-template-content-format"),
        "response-role",
    ),
    "requests may ask for up to 20 log-probabilities of a token": ("max-logprobs",),
    "each request asks for it (docs/api.md)": (
        *("enable-force-include-usage", "return-tokens-as-token-ids", "logprobs-mode"),
        *("exclude-tools-when-tool-choice-none", "structured-outputs-config"),
        *("guided-decoding-backend", "grammar-backend", "early-stop-config"),
        *("guided-decoding-disable-any-whitespace", "constrained-json-disable-any-whitespace"),
    ),
    "the log never has texts, and the server has no traces": (
        *("enable-log-outputs", "enable-log-deltas", "log-config-file", "log-error-stack"),
        *("otlp-traces-endpoint", "collect-detailed-traces", "enable-trace", "profiler-config"),
    ),
    "it is a flag of FastDeploy; give it after -- with --engine fastdeploy": (
        *("plas-attention-config", "static-decode-blocks", "moba-attention-config"),
        "load-strategy",
    ),
}
"""Refused flags, by the reason and what to do. Some have accepted values in `NOT_NEEDED`."""


def collect(
    not_needed: Mapping[str, tuple[str, ...]],
    refused: Mapping[str, tuple[str, ...]],
    other_names: Mapping[str, tuple[str, ...]],
) -> dict[str, Known]:
    """Return the flags of tables like those of this module, by name on the command line."""
    found: dict[str, Known] = {}
    for ours, names in other_names.items():
        found |= {as_flag(name): Known("", f"the flag for this is {ours}") for name in names}
    for reason, names in refused.items():
        found |= {as_flag(name): Known("", f"not supported: {reason}") for name in names}
    for reason, forms in not_needed.items():
        for form in forms:
            name, equals, values = form.partition("=")
            neutral = tuple(values.split("|")) if values else ()
            refusal = found[as_flag(name)].refusal if neutral else ""
            found[as_flag(name)] = Known(reason, refusal, bool(equals), neutral)
    return found


def as_flag(name: str) -> str:
    """Return the flag of a name in these tables, as on a command line."""
    return name if name.startswith("-") else f"--{name}"


KNOWN = collect(NOT_NEEDED, REFUSED, OTHER_NAMES)
"""Flags of other servers, by name on a command line."""


def remove_known_flags(
    words: Sequence[str], table: Mapping[str, Known] = KNOWN
) -> tuple[list[str], dict[str, str]]:
    """Remove flags of other servers from a command line.

    Args:
        table: flags of other programs, a result of `collect`.

    Returns:
        The remaining words, and for each removed flag the reason why it is not needed.

    Raises:
        ConfigError: a flag would change answers. The message names the flag of this server for it.
    """
    left: list[str] = []
    reasons: dict[str, str] = {}
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        flag, equals, value = word.partition("=")
        found = find(flag, table) if word.startswith("-") else None
        if found is None:
            left.append(word)
            continue
        known, is_off = found
        has_next = bool(rest) and re.fullmatch(r"(?!-[^\d.]).*", rest[-1], re.DOTALL)
        if known.takes_value and not is_off and not equals and has_next:
            value = rest.pop()
        reasons[flag] = check_value(flag, value, known, is_off)
    return left, reasons


def find(flag: str, table: Mapping[str, Known] = KNOWN) -> tuple[Known, bool] | None:
    """Return a flag of another server, and True if `flag` is its opposite, `--no-...`.

    As in vLLM, names may have underscores, and a key of a JSON value may follow a dot.
    """
    name = flag.partition(".")[0].replace("_", "-")
    if name in table:
        return table[name], False
    opposite = table.get(f"--{name.removeprefix('--no-')}")
    return None if opposite is None or not name.startswith("--no-") else (opposite, True)


def check_value(flag: str, value: str, known: Known, is_off: bool) -> str:
    """Return why a flag of another server is not needed.

    Args:
        flag: name of the flag, for the message.
        value: value of the flag, "" for a switch.
        is_off: True if the flag is switched off.

    Raises:
        ConfigError: this value would change answers.
    """
    if is_off:
        return known.reason or "it is off"
    if known.neutral and value in known.neutral:
        return known.reason
    if known.refusal:
        # the value of a flag that is always refused may be a secret
        allowed = ", ".join(known.neutral)
        got = f"got {shorten(value)}, allowed: {allowed}; " if allowed else ""
        raise ConfigError(f"{shorten_text(flag)}: {got}{known.refusal}")
    return known.reason
