"""Interface of a model to its runner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from fd_dsa.attention.protocol import LayerStep
from fd_dsa.distributed import Group
from fd_dsa.tensor import StepArray


class RunConfig(Protocol):
    """Sizes of a model that its runner depends on."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits of all ranks."""

    @property
    def index_topk(self) -> int:
        """Number of keys or entries that an indexer selects for a token."""

    @property
    def max_dense_keys(self) -> int:
        """Maximum length of a row whose last token attends to all keys, tokens."""

    @property
    def has_indexer(self) -> Sequence[bool]:
        """Flag of each layer, True if it has an indexer of its own."""


class MtpLayer(Protocol):
    """Layer for multi-token prediction, which drafts the token after the next one."""

    @property
    def embed_tokens(self) -> StepArray:
        """Embedding [vocab_size, hidden_size] of the next tokens."""

    @property
    def num_streams(self) -> int:
        """Number of residual streams in a hidden state, each as wide as the embedding."""

    def __call__(self, next_ids: StepArray, hidden: StepArray, step: LayerStep) -> StepArray:
        """Compute hidden states of the layer, [num_tokens, width].

        Args:
            next_ids: integers [num_tokens]; the token after each token of the step.
            hidden: [num_tokens, width]; hidden states that the model returns, or for a further
                draft those of the layer.
            step: step whose metadata was built last.
        """

    def compute_logits(self, hidden_states: StepArray, out: StepArray | None = None) -> StepArray:
        """Compute logits float32 [n, vocab_size] of hidden states of the layer, see Model."""


class Model(Protocol):
    """Decoder that runs on the steps of a runner."""

    @property
    def config(self) -> RunConfig:
        """Sizes of the model."""

    @property
    def group(self) -> Group | None:
        """Ranks that share the model, None = one rank."""

    @property
    def mtp(self) -> MtpLayer | None:
        """Layer for multi-token prediction, None unless it is loaded."""

    def one_layer_of_each_kind(self) -> AbstractContextManager[None]:
        """Run steps through the first layer of each kind inside, see `Decoder`."""

    def __call__(self, token_ids: StepArray, forward_meta: LayerStep) -> StepArray:
        """Compute hidden states of all tokens of a step, [num_tokens, width]."""

    def compute_logits(self, hidden_states: StepArray, out: StepArray | None = None) -> StepArray:
        """Compute logits float32 [n, vocab_size] of hidden states [n, width].

        Args:
            out: memory of the logits on a device; None allocates.
        """
