"""The modes of the engine that a matrix compares, as data.

Each mode is the reference with something changed, and is compared with one other mode. It is
"exact" where nothing but the way to the same numbers differs: the same provider, cache dtype and
batch. All others are deviations, whose size is to be stated. Where one order of sums is asked for,
the way makes no difference to any bit, so the batch and caches of few bits are exact too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from fd_dsa.errors import ConfigError

REFERENCE = "reference"
CHUNK, SMALL_CHUNK = 512, 64
BATCH = 32
DEVICE, CPU, CUSTOM_OPS = "device", "cpu", "custom_ops"
INVARIANT = "FD_DSA_BATCH_INVARIANT"


class FromWorkload(Enum):
    """Numbers of an engine that depend on what it is asked."""

    LONGEST_PROMPT = "tokens of the longest prompt"
    LONGEST_SEQUENCE = "tokens of the longest prompt and answer"
    AMPLE_BLOCKS = "blocks for as many of the longest requests as run at once"
    FEW_BLOCKS = "blocks for the longest request, and hardly more"


@dataclass(frozen=True)
class Mode:
    """One way to run the same requests.

    Attributes:
        name: on the command line and in files.
        changed: what differs from the mode it is compared with, in words.
        against: name of that mode; None for the reference alone.
        exact: whether it must agree with it to the token.
        engine: fields of EngineConfig that differ from `BASE_ENGINE`.
        environment: variables of the process in which it runs; any means a process of its own.
        warm: requests come a second time, to a prefix cache that the first time has filled.
        short: requests with long prompts are left out, so that the cache can be small.
        needs: None, or what must be there: the reference runs on a `DEVICE` or on a `CPU`, or
            `CUSTOM_OPS` are built for the device.
    """

    name: str
    changed: str
    against: str | None
    exact: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    warm: bool = False
    short: bool = False
    needs: str | None = None

    @property
    def kind(self) -> str:
        """`reference`, `exact` or `deviation`."""
        if self.against is None:
            return "reference"
        return "exact" if self.exact else "deviation"


BASE_ENGINE: Mapping[str, Any] = {
    "kv_cache_dtype": "float32",
    "max_model_len": FromWorkload.LONGEST_SEQUENCE,
    "max_num_seqs": BATCH,
    "max_num_batched_tokens": CHUNK,
    "num_gpu_blocks_override": FromWorkload.AMPLE_BLOCKS,
    "enable_prefix_caching": False,
    "seed": 0,
}
"""Fields of EngineConfig in the reference mode."""

_SMALL = {"max_num_batched_tokens": SMALL_CHUNK}
_ONE_SHOT = {"max_num_batched_tokens": FromWorkload.LONGEST_PROMPT}
_HITS = {"enable_prefix_caching": True}
_SCARCE = {"num_gpu_blocks_override": FromWorkload.FEW_BLOCKS}
_ALL = {**_SMALL, **_HITS, **_SCARCE}


def _dtype(name: str, beside: Mode) -> Mode:
    """The mode of a cache dtype."""
    dtype = "fp8_ds_mla" if name.endswith("fp8") else "bfloat16"
    return replace(
        beside,
        name=name,
        changed=f"{dtype} caches",
        against=beside.name,
        engine={"kv_cache_dtype": dtype},
    )


def _all_at_once(beside: Mode, *, exact: bool) -> Mode:
    """Small chunks, prefix hits and preemption, all in one."""
    name = "all-at-once" if beside.name == REFERENCE else f"{beside.name}-all"
    return replace(
        beside,
        name=name,
        changed=f"chunks of {SMALL_CHUNK}, prefix hits and preemption at once",
        against=beside.name,
        exact=exact,
        engine={**beside.engine, **_ALL},
        warm=True,
        short=True,
    )


_REFERENCE = Mode(REFERENCE, f"chunks of {CHUNK}, batch {BATCH}, float32 caches", None)
_BFLOAT16, _FP8 = _dtype("bfloat16", _REFERENCE), _dtype("fp8", _REFERENCE)
_ONE_ORDER = {INVARIANT: "1"}
_INVARIANT = Mode("invariant", f"{INVARIANT}=1", REFERENCE, environment=_ONE_ORDER, needs=CPU)
_INVARIANT_BFLOAT16 = _dtype("invariant-bfloat16", _INVARIANT)
_INVARIANT_FP8 = _dtype("invariant-fp8", _INVARIANT)

QUICK_MODES = "chunk-64,one-shot,prefix-hits,preemption,batch-1,fp8"

MODES: tuple[Mode, ...] = (
    _REFERENCE,
    Mode("chunk-64", f"chunks of {SMALL_CHUNK} tokens", REFERENCE, True, _SMALL),
    Mode("one-shot", "a prompt in one chunk", REFERENCE, True, _ONE_SHOT),
    Mode("prefix-hits", "prompts found in the prefix cache", REFERENCE, True, _HITS, warm=True),
    Mode("preemption", "a cache too small for all requests", REFERENCE, True, _SCARCE, short=True),
    _all_at_once(_REFERENCE, exact=True),
    Mode("batch-1", "one request at a time", REFERENCE, False, {"max_num_seqs": 1}),
    _BFLOAT16,
    # rounding to few bits makes a last bit that differs large, so these promise nothing
    _all_at_once(_BFLOAT16, exact=False),
    _FP8,
    _all_at_once(_FP8, exact=False),
    _INVARIANT,
    _all_at_once(_INVARIANT, exact=True),
    replace(
        _INVARIANT,
        name="invariant-batch-1",
        changed="one request at a time",
        against="invariant",
        exact=True,
        engine={"max_num_seqs": 1},
    ),
    _INVARIANT_BFLOAT16,
    _all_at_once(_INVARIANT_BFLOAT16, exact=True),
    _INVARIANT_FP8,
    _all_at_once(_INVARIANT_FP8, exact=True),
    Mode(
        "paddle",
        "Paddle's operators, on the CPU",
        REFERENCE,
        engine={"device": "cpu"},
        needs=DEVICE,
    ),
    Mode(
        "triton",
        "Triton's kernels in the place of the custom operators",
        REFERENCE,
        environment={"FD_DSA_OP_PROVIDER": "topk=triton"},
        needs=CUSTOM_OPS,
    ),
)


def choose(names: str | None) -> tuple[Mode, ...]:
    """Modes by names separated by commas, with those that they are compared with; None = all.

    Raises:
        ConfigError: there is no mode of that name.
    """
    if names is None:
        return MODES
    known = {mode.name: mode for mode in MODES}
    wanted = set()
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in known:
            raise ConfigError(f"--modes: got {name!r}, allowed: {', '.join(known)}")
        against: str | None = name
        while against is not None:
            wanted.add(against)
            against = known[against].against
    if not wanted:
        raise ConfigError(f"--modes: got {names!r}, allowed: {', '.join(known)}")
    return tuple(mode for mode in MODES if mode.name in wanted)
