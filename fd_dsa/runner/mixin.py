"""Hook of both runners that builds the metadata once a step."""

from __future__ import annotations

from typing import Any

from fd_dsa.attention import DSAAttentionBackend, StepHints


class DSAModelRunnerMixin:
    """Mixin before a runner class whose `initialize_forward_meta` sets `forward_meta`.

    The runner keeps its backends in `self.attn_backends`. If the first one is a
    DSAAttentionBackend, the mixin gives it the counts that the host knows of the step. It also
    makes sure that the metadata exists afterwards. Without a backend, or with a foreign one, the
    step stays as it is.

    Attributes:
        backend_class: class of the backends that get metadata.
        attn_backends: backends of the runner; empty until the runner has made them.
        forward_meta: newest step.

    Source: FastDeploy #7367 (position ids and slot mapping once per step in the runner) and the
    reviews of #7598.
    """

    backend_class: type = DSAAttentionBackend
    attn_backends: Any = ()
    forward_meta: Any

    def dsa_backend(self) -> Any:
        """Return the runner's DSA backend, or None."""
        first = self.attn_backends[0] if self.attn_backends else None
        return first if isinstance(first, self.backend_class) else None

    def step_hints(self) -> StepHints | None:
        """Return the counts of the coming step that the host knows, or None."""
        return None

    def initialize_forward_meta(self, *args: Any, **kwargs: Any) -> Any:
        """Run the runner's own hook, then build the metadata unless the hook has built it.

        Raises:
            ValueError: inconsistent lengths or block tables, with row and value.
            MissingStepError: the runner left lengths or block tables unset.
        """
        backend = self.dsa_backend()
        if backend is not None:
            backend.set_step_hints(self.step_hints())
        result = super().initialize_forward_meta(*args, **kwargs)  # type: ignore[misc]
        if backend is not None:
            backend.init_attention_metadata(self.forward_meta)
        return result
