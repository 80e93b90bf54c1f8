"""Construction of an engine from its configuration: plan, weights, memory, warm-up."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fd_dsa.config import EngineConfig
from fd_dsa.distributed.host import HostGroup
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter, MtpDrafter
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.speculation import ArbitraryDrafter, Drafter, SpecDecoder
from fd_dsa.engine.step_times import StepTable
from fd_dsa.errors import RankError, describe_error
from fd_dsa.startup.hardware import warming_on
from fd_dsa.startup.host_tier import add_host_tier, make_block_stores
from fd_dsa.startup.load import load_model
from fd_dsa.startup.measure import measure_step_costs, measure_step_table
from fd_dsa.startup.plan import EnginePlan, make_plan
from fd_dsa.startup.progress import StartupProgress
from fd_dsa.startup.ranks import Ranks
from fd_dsa.startup.trial_rows import clear_rows
from fd_dsa.startup.warm_up import (
    compile_in_processes,
    interprets,
    runs_compiled,
    share_activations,
    warm_up,
)

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner

_Runner = TypeVar("_Runner", bound="ModelRunner")
logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig, progress: StartupProgress | None = None) -> LLMEngine:
    """Build an engine over the model of `config`, ready for requests.

    Flags, files and memory are checked first. Then memory is taken and weights are loaded.

    Args:
        progress: gets the phases; None = they are only logged.

    Raises:
        ConfigError: a flag, the folder, its checkpoint or the memory is wrong. The message has the
            cure.
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
    """Build the engine, whose other ranks have been started."""
    group = None if ranks is None else ranks.group
    plan = make_plan(config, group)
    progress.done(plan.summary())
    # these import paddle, after `make_plan` has set its environment
    from fd_dsa.runner.model_runner import ModelRunner
    from fd_dsa.runner.ranks import DriverRunner

    runner: ModelRunner
    if ranks is None:
        runner = build_runner(plan, group, progress, ModelRunner)
    else:
        runner = driver = build_runner(plan, group, progress, DriverRunner)
        driver.lead(ranks)
        weakref.finalize(runner, ranks.close)
    make = partial(
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
        step_table=measure_steps(runner, plan),
    )

    def make_engine(**given: Any) -> LLMEngine:
        engine = make(**given)
        engine.block_manager.shares_blocks = plan.caches.shares_blocks
        engine.block_manager.repeats_chunks = plan.caches.repeats_chunks
        return engine

    engine = make_engine(spec_decoder=_make_spec_decoder(runner, plan, make_engine))
    has_host_memory = runner.block_store is not None
    num_in_host = plan.memory.num_host_snapshots if has_host_memory else 0
    if (snapshots := plan.caches.snapshots(runner.copy_state, num_in_host)) is not None:
        engine.block_manager.use_snapshots(snapshots)
    if runner.block_store is not None:
        add_host_tier(engine, runner.block_store, plan)
    engine.grammars.prepare()
    engine.metrics.cache_config["cache_dtype"] = plan.config.kv_cache_dtype
    if ranks is not None:
        ranks.ready()
    return engine


def build_runner(
    plan: EnginePlan, group: HostGroup | None, progress: StartupProgress, kind: type[_Runner]
) -> _Runner:
    """Build this rank's runner, with its model loaded and its steps warm.

    Args:
        group: ranks that share the model, each in a process like this; None = one rank.
        progress: as for `build_engine`.
        kind: class of the runner.
    """
    batch, device, drafts = plan.input_batch, plan.device, plan.config.max_drafts
    with warming_on(device):
        model = load_model(plan, group, progress)
        # it checks its kernels
        backend = plan.caches.backend(plan.memory.num_blocks, device, model.group)
        runner = kind(model, batch, backend, device, drafts)
    progress.done(plan.memory.summary())
    share_activations(plan)
    if group is None or group.rank == 0:
        # all ranks have the same kernels
        compile_in_processes(runner, plan)
    if group is not None:
        # a warm-up waits for the other ranks on the device, which does not notice a missing rank
        group.barrier()
    progress.done(warm_up(runner, plan))
    if group is not None:
        group.barrier()
    runner.block_store, states = make_block_stores(runner, plan, group)
    runner.state_copy = plan.caches.state_copies(backend, states)
    return runner


def measure_steps(runner: ModelRunner, plan: EnginePlan) -> StepTable | None:
    """Measure steps with prompts if a target limits their time, except on slow devices."""
    is_paced = plan.config.target_inter_token_latency_ms > 0
    if not is_paced or not runs_compiled(plan.device):
        return None
    try:
        return measure_step_table(runner, plan.max_model_len)
    except RankError:
        raise
    except Exception as error:
        logger.warning("step times are learned from requests: %s", describe_error(error))
        clear_rows(runner.input_batch)
        return None


def _make_spec_decoder(
    runner: ModelRunner, plan: EnginePlan, make_engine: Callable[..., LLMEngine]
) -> SpecDecoder | None:
    """Make the SpecDecoder with a measured cost table, or return None without drafts."""
    asked = plan.config.speculation
    if asked is None:
        return None
    make_drafter: Callable[[], Drafter] = ArbitraryDrafter
    if asked.method == "mtp":
        on_host = runner.info.sampling is None
        make_drafter = partial(MtpDrafter if on_host else DeviceMtpDrafter, runner)
    max_drafts, costs = asked.num_speculative_tokens, None
    if not interprets(plan.device):
        shares = plan.caches.shares_blocks

        def make_measured(spec_decoder: SpecDecoder) -> LLMEngine:
            return make_engine(spec_decoder=spec_decoder, enable_prefix_caching=shares)

        costs = measure_step_costs(make_measured, make_drafter(), max_drafts)
    if asked.method == "ngram":
        make_drafter = partial(PromptLookup, asked.prompt_lookup_max, asked.prompt_lookup_min)
    # a new drafter, because the measured one remembers its requests
    return SpecDecoder(make_drafter(), max_drafts, costs)
