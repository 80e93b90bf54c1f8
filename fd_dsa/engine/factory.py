"""From a configuration to an engine that runs: folder, memory, model, caches."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.config import EngineConfig
from fd_dsa.distributed import Group
from fd_dsa.distributed.host import HostGroup
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter, MtpDrafter
from fd_dsa.engine.plan import EnginePlan, make_plan
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.ranks import Ranks
from fd_dsa.engine.speculation import ArbitraryDrafter, Drafter, Speculator
from fd_dsa.engine.startup import LoadProgress, StartupProgress
from fd_dsa.engine.step_costs import measure_steps
from fd_dsa.errors import DeviceError
from fd_dsa.models.memory_plan import format_bytes

if TYPE_CHECKING:
    from fd_dsa.device.allocation import Allocate


def build_engine(config: EngineConfig, progress: StartupProgress | None = None) -> LLMEngine:
    """An engine over the model of `config`, ready for requests.

    Everything that can be refused is refused before memory is taken; then weights are loaded.

    Args:
        progress: follows the phases; None = the log alone.

    Raises:
        ConfigError: a flag, the folder, its checkpoint or the memory; says which and what to do.
        BackendUnavailable: Paddle is missing, or has no such device.
    """
    progress = progress or StartupProgress()
    ranks = Ranks(config) if config.tensor_parallel_size > 1 else None
    try:
        return _build(config, ranks, progress)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise


def _build(config: EngineConfig, ranks: Ranks | None, progress: StartupProgress) -> LLMEngine:
    """`build_engine`, where the other ranks have been started."""
    group = None if ranks is None else ranks.group
    plan = make_plan(config, group)
    progress.done(plan.summary())
    from fd_dsa.runner.preparation import ModelRunner
    from fd_dsa.runner.ranks import LeadingRunner

    runner = build_runner(plan, group, progress, ModelRunner if ranks is None else LeadingRunner)
    if ranks is not None:
        runner.lead(ranks)
        weakref.finalize(runner, ranks.close)
    make_engine = partial(
        LLMEngine,
        runner,
        plan.tokenizer,
        num_blocks=plan.memory.num_blocks,
        max_model_len=plan.max_model_len,
        eos_token_ids=plan.model_config.eos_token_ids,
        target_gap_s=config.target_inter_token_latency_ms / 1e3,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
        sampling_defaults=plan.sampling_defaults,
        async_scheduling=config.async_scheduling,
    )
    engine = make_engine(speculator=_make_speculator(runner, plan, make_engine))
    engine.grammars.prepare()
    engine.metrics.cache_config["cache_dtype"] = plan.config.kv_cache_dtype
    if ranks is not None:
        ranks.ready()
    return engine


def build_runner(
    plan: EnginePlan,
    group: HostGroup | None,
    progress: StartupProgress,
    kind: type[Any],
) -> Any:
    """A runner of a kind, its model loaded, its steps warm; every rank makes its own.

    Args:
        group: ranks that share the model, each in a process like this; None: there is one.
        progress: as of `build_engine`.
        kind: ModelRunner or a subclass.
    """
    model = load_model(plan, group, progress)
    num_blocks = plan.memory.num_blocks
    backend = plan.caches.backend(num_blocks, plan.device)
    drafts = plan.config.most_drafts
    batch, device = plan.input_batch, plan.device
    runner = kind(model, batch, None, num_blocks, device, backend, most_drafts=drafts)
    progress.done(plan.memory.summary())
    if group is not None:
        # a warm-up meets the others on the device, where nobody sees that one is not there
        group.barrier()
    progress.done(warm_up(runner, plan))
    if group is not None:
        group.barrier()
    return runner


def load_model(plan: EnginePlan, group: HostGroup | None, progress: StartupProgress) -> Any:
    """The model with its weights, on its device."""
    from fd_dsa.models.configs import open_checkpoint
    from fd_dsa.models.loader import load_dummy_weights, load_weights
    from fd_dsa.models.registry import create_model
    from fd_dsa.models.weights import HostWeights

    begin = time.perf_counter()
    weights: Any = HostWeights(group)
    if plan.device != "cpu":
        # kernels and their launcher are loaded only where a device is asked for
        from fd_dsa.device.allocation import paddle_allocator
        from fd_dsa.models.device_weights import DeviceWeights

        allocate, rounds = paddle_allocator(plan.device), plan.model_config.round_scales
        weights = DeviceWeights(
            plan.config.dtype,
            allocate,
            plan.fp8,
            round_scales=rounds,
            group=_on_device(group, allocate),
        )
    model = create_model(plan.model_config, weights)
    with LoadProgress(progress) as bar:

        def loaded(done: int, total: int) -> None:
            bar(done, total)
            if group is not None:
                group.check()

        whole = plan.whole_config
        if plan.config.load_format == "dummy":
            load_dummy_weights(whole, model.loaders, plan.config.seed, loaded, group)
        else:
            with open_checkpoint(whole, plan.config.model_path) as checkpoint:
                load_weights(checkpoint, whole, model.loaders, loaded, group)
    weights.finish()
    how = "made up" if plan.config.load_format == "dummy" else "read"
    progress.done(f"{format_bytes(bar.total_bytes)} {how} in {time.perf_counter() - begin:.1f} s")
    return model


def _on_device(group: HostGroup | None, allocate: Allocate) -> Group | None:
    """The group of the same ranks whose tensors are on their devices."""
    if group is None:
        return None
    group.has_devices = True
    # kernels and libraries are loaded only where a device is asked for
    from fd_dsa.distributed.device import DeviceGroup
    from fd_dsa.distributed.nccl import new_unique_id

    # all ranks take that of rank 0
    name = group.all_gather(np.frombuffer(new_unique_id(), np.uint8))[0].tobytes()
    return DeviceGroup(group.rank, group.size, name, allocate)


def warm_up(runner: Any, plan: EnginePlan) -> str:
    """Compile the kernels of a device and capture decode steps; returns what was done.

    From then on a step that compiles is logged. Where kernels are interpreted there is nothing to
    compile, and nothing can be captured.
    """
    nothing = "not needed on this device"
    if plan.device == "cpu" or _interprets(plan.device):
        return nothing
    from fd_dsa.runner.step_graphs import PaddleCapture
    from fd_dsa.triton_runtime import freeze, warming

    start = time.perf_counter()
    # another engine of this process may have frozen it
    with warming():
        runner.warm_up(before_captures=not plan.config.enforce_eager)
        ready = time.perf_counter()
        if not plan.config.enforce_eager:
            runner.capture_graphs(plan.config.capture_sizes, PaddleCapture)
            if not runner.captured_sizes and plan.config.tensor_parallel_size > 1:
                # others may have theirs
                raise DeviceError("steps cannot be captured; start with --enforce-eager")
    freeze()
    done = f"kernels ready after {ready - start:.1f} s"
    if not runner.captured_sizes:
        return done
    sizes = ", ".join(map(str, runner.captured_sizes))
    sizes += " rows, further drafts" if runner.graphs.drafts else " rows"
    seconds = time.perf_counter() - ready
    return f"{done}, decode steps of {sizes} and short prompts captured in {seconds:.1f} s"


def _interprets(device: str) -> bool:
    """Whether kernels run in Triton's interpreter, where times mean nothing."""
    if device == "cpu":
        return False
    from fd_dsa.triton_runtime import INTERPRETING

    return INTERPRETING


def _make_speculator(
    runner: Any, plan: EnginePlan, make_engine: Callable[..., LLMEngine]
) -> Speculator | None:
    """What makes and verifies drafts, where some are asked for."""
    asked = plan.config.speculation
    if asked is None:
        return None
    make_drafter: Callable[[], Drafter] = ArbitraryDrafter
    if asked.method == "mtp":
        on_host = runner.info.sampling is None
        make_drafter = partial(MtpDrafter if on_host else DeviceMtpDrafter, runner)
    most, costs = asked.num_speculative_tokens, None
    if not _interprets(plan.device):
        measured = Speculator(make_drafter(), most)
        engine = make_engine(speculator=measured, enable_prefix_caching=True)
        costs = measure_steps(engine, measured)
    if asked.method == "ngram":
        make_drafter = partial(PromptLookup, asked.prompt_lookup_max, asked.prompt_lookup_min)
    # a drafter remembers requests, so it is another one
    return Speculator(make_drafter(), most, costs)
