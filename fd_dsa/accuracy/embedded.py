"""A model of the embedded engine, driven directly: one sequence, all hidden states.

The engine computes logits only for tokens that it samples. Measurements need intermediate results
of the layers for given tokens. So they drive the engine's runner directly, with the same steps that
the engine would make for one request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.config import EngineConfig
from fd_dsa.environment import prepare_cpu_runtime
from fd_dsa.errors import ConfigError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer
    from fd_dsa.models.config import ModelConfig


class SingleSequenceRunner:
    """Runs one sequence on a ModelRunner that has no other user.

    It uses row 0 of the batch and all blocks of the caches.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        batch = runner.input_batch
        count = min(int(runner.caches[0].shape[0]), batch.block_tables.shape[1])
        self.block_table = np.arange(count, dtype=np.int32)
        self.length = 0

    def slots(self, count: int) -> np.ndarray:
        """Return the slots of the first positions in the caches, int64 [count]."""
        positions, size = np.arange(count), int(self.runner.input_batch.block_size)
        return self.block_table[positions // size].astype(np.int64) * size + positions % size

    def run(self, token_ids: Sequence[int], *, decode: bool = False) -> Any:
        """Run the next tokens in one step, as a chunk of a prompt or as a decode row.

        Returns:
            float32 [n, hidden_size]: a NumPy array on a CPU, otherwise a tensor on the device.
        """
        import paddle

        runner, batch = self.runner, self.runner.input_batch
        end, room = self.length + len(token_ids), len(self.block_table) * int(batch.block_size)
        if end > room:
            raise ValueError(f"token_ids: {end} tokens, the caches have room for {room}")
        batch.begin_step()
        batch.set_blocks(0, self.block_table)
        batch.add_row(0, token_ids, self.length, is_prefill=not decode)
        with paddle.no_grad():
            runner.initialize_forward_meta()
            meta = runner.forward_meta
            hidden = runner.model(meta.token_ids, meta)
        self.length = end
        return hidden

    def chunks(self, token_ids: Sequence[int]) -> Iterator[Any]:
        """Begin a sequence with a prompt, in steps of at most `max_num_tokens` tokens.

        Old cache contents need not be cleared, because a sequence reads only positions it has
        written.

        Yields:
            The hidden states of each step, as `run` returns them.
        """
        self.length = 0
        size = int(self.runner.input_batch.max_num_tokens)
        for start in range(0, len(token_ids), size):
            yield self.run(token_ids[start : start + size])


@dataclass(frozen=True)
class OpenModel:
    """A loaded model for one sequence at a time.

    Attributes:
        config: has the requested `index_topk`.
    """

    sequence: SingleSequenceRunner
    tokenizer: Tokenizer
    config: ModelConfig

    @property
    def device(self) -> str:
        return str(self.sequence.runner.device)


def read_config(model: str | os.PathLike[str] | None, index_topk: int | None = None) -> ModelConfig:
    """Read a model's config.json before the model is loaded."""
    asked = EngineConfig(model=model, index_topk=index_topk)
    prepare_cpu_runtime()
    from fd_dsa.models import registry
    from fd_dsa.models.config import ModelConfig

    config = registry.read_config(asked.model_path)
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{asked.model_path / 'config.json'}: model_type: got {config.model_type!r}; must be a "
            "family with the layers of DeepSeek-V3.2, whose attention these commands measure"
        )
    return config if index_topk is None else replace(config, index_topk=index_topk)


def open_model(config: EngineConfig) -> OpenModel:
    """Load the model of a configuration that has a `max_model_len`."""
    model_config = read_config(config.model, config.index_topk)
    config = config.with_blocks(model_config.default_block_size)
    assert config.max_model_len is not None, "the caches have room for a sequence of this length"
    blocks = -(-config.max_model_len // config.tokens_per_block)
    from fd_dsa.startup.build import build_engine

    engine = build_engine(replace(config, max_num_seqs=1, num_gpu_blocks_override=blocks))
    sequence = SingleSequenceRunner(engine.runner)
    return OpenModel(sequence, engine.tokenizer, model_config)
