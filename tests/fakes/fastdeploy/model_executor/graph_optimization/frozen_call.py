"""A captured call: what a CUDA graph keeps of it, kept by other means.

A graph replays kernels on the addresses, shapes and host values of its capture; no Python runs.
Here the layers' Python does run, but sees only what was there at the capture: the same tensors in
their shapes of then (a buffer's shape changes with every step, its captured view's does not), the
same ForwardMeta, and every attribute of the attention backend and of what hangs on it as it was.
Afterwards all of that is put back, so the call leaves no trace but in memory.

On a CPU the attributes are those before the warm-up: a backend's work lists, which its first layer
makes of the step's tensors, stand for what kernels read there, and a replay reads them again. On a
device they are those after the warm-up, and what a layer keeps of a step then stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import paddle

from fastdeploy._memory import is_freed

_OWNERS = ("fd_dsa.", "fastdeploy.model_executor.layers.attention")


class GraphError(RuntimeError):
    """A replay would touch memory that is gone, or read where the step did not write."""


class FrozenCall:
    """`runnable(**kwargs)`, captured after some warm-up calls; it runs again with every replay.

    Attributes:
        output: the captured result; every replay writes into it.
    """

    def __init__(
        self, runnable: Callable[..., Any], kwargs: dict[str, Any], num_warmups: int
    ) -> None:
        self._runnable, self._forward_meta = runnable, kwargs["forward_meta"]
        state = self._frozen_state()
        for _ in range(num_warmups):
            runnable(**kwargs)
        self._addresses = _addresses(kwargs)
        self._kwargs = {name: _view(value) for name, value in kwargs.items()}
        on_host = kwargs["ids_remove_padding"].place.is_cpu_place()
        self._state = state if on_host else self._frozen_state()
        self.output = runnable(**kwargs)

    def replay(self, kwargs: dict[str, Any]) -> Any:
        """The captured result after another run over the memory of the capture.

        Raises:
            GraphError: captured memory was freed, or `kwargs` has a tensor somewhere else.
        """
        self._check(_addresses(kwargs))
        live = _state_of([owner for owner, _ in self._state])
        _put(self._state)
        try:
            self.output.copy_(self._runnable(**self._kwargs), False)
        finally:
            _put(live)
        return self.output

    def _check(self, now: dict[str, int]) -> None:
        for name, address in self._addresses.items():
            if is_freed(address):
                raise GraphError(f"{name}: its memory was freed after the capture")
            if now.get(name, address) != address:
                raise GraphError(f"{name}: lies elsewhere than at the capture, which is stale")

    def _frozen_state(self) -> list[tuple[Any, dict[str, Any]]]:
        """Attributes as of now, their tensors in the shapes of now."""
        return [
            (owner, {name: _view(value) for name, value in attributes.items()})
            for owner, attributes in _state_of(self._owners())
        ]

    def _owners(self) -> list[Any]:
        """The forward_meta, its attention backend, and the objects that the backend holds."""
        found: dict[int, Any] = {}
        waiting = [self._forward_meta.attn_backend]
        while waiting:
            one = waiting.pop()
            if id(one) not in found and _is_owner(one):
                found[id(one)] = one
                waiting += vars(one).values()
        return [self._forward_meta, *found.values()]


def _is_owner(value: Any) -> bool:
    """Return True if Python attributes of an object could steer the layers. A runner's do not."""
    module = type(value).__module__
    # on a CPU the lists of a step's work are made where a GPU's kernels would read memory
    ours = module.startswith(_OWNERS) and module != "fd_dsa.attention.host"
    return ours and hasattr(value, "__dict__") and not hasattr(value, "share_inputs")


def _state_of(owners: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    return [(owner, dict(vars(owner))) for owner in owners]


def _put(state: list[tuple[Any, dict[str, Any]]]) -> None:
    for owner, attributes in state:
        vars(owner).clear()
        vars(owner).update(attributes)


def _view(value: Any) -> Any:
    """A tensor's memory in its shape of now, whatever shape the tensor takes on later."""
    if isinstance(value, paddle.Tensor) and 0 not in value.shape:
        # a slice or a detached tensor would change its shape together with the tensor
        return value.view(value.shape)
    return value


def _addresses(kwargs: dict[str, Any]) -> dict[str, int]:
    """Address of every tensor that the arguments reach, by name."""
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        inner = vars(value) if name == "forward_meta" else {name: value}
        for attribute, one in inner.items():
            found.update(_named_tensors(attribute, one))
    return {name: one.data_ptr() for name, one in found.items() if 0 not in one.shape}


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors in an attribute: itself, in a list, or in a dataclass such as a step's record."""
    if isinstance(value, paddle.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from _named_tensors(f"{name}[{index}]", one)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _named_tensors(f"{name}.{field.name}", getattr(value, field.name))
