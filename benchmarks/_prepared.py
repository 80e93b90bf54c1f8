"""The harness of benchmarks of one small launch per layer: inputs, sides, candidates."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks import _gpu

MAX_POSITION = 1 << 16
ROPE = 64
OURS = "one launch"


@cache
def angles() -> torch.Tensor:
    """Return float32 [max_position, 64], cos followed by sin."""
    angle = torch.rand(MAX_POSITION, ROPE // 2, device="cuda") * 6
    return torch.cat([angle.cos(), angle.sin()], 1)


def as_numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Return copies of tensors, with bfloat16 converted to float32."""
    return [(x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy() for x in tensors]


class Launch:
    """A launch for the tokens of a step, with its own inputs and outputs.

    Each benchmark has a subclass with these methods:

    - arguments(positions, cos_sin, **variant): arguments of the kernel by name. Positions are None
      if cos and sin are those of the tokens.
    - expected(**variant): the outputs of the CPU, over the poison.
    - sides(peer): other ways to make the same outputs.
    - bytes_of(*shape): the smallest number of moved bytes.

    Attributes:
        kernel: the Triton kernel.
        candidates: configurations of the kernel.
        shapes, quick: timed shapes, and those of --quick.
        name: template of a shape's name.
        subjects_of: name, shape and variant of the profiled and repeated launches.
        variants: keywords of the operator. All are compared with the CPU.
        find_peer: finds the peer in the folder of `--peers`, or None without a peer.
        positions: int64 [num_tokens], positions of the tokens.
        outputs: tensors that the launch writes.
        chosen: the configuration that serves.
    """

    kernel: ClassVar[Any]
    candidates: ClassVar[Sequence[tuple[Any, ...]]]
    shapes: ClassVar[Sequence[tuple[int, ...]]]
    quick: ClassVar[Sequence[tuple[int, ...]]]
    name: ClassVar[str] = "{} tokens, {} heads"
    subjects_of: ClassVar[Sequence[tuple[str, tuple[int, ...], dict[str, Any]]]]
    variants: ClassVar[Sequence[dict[str, Any]]] = ({},)
    find_peer: ClassVar[Callable[[Any], Any] | None] = None
    arguments: Callable[..., dict[str, Any]]
    expected: Callable[..., Sequence[np.ndarray]]
    sides: Callable[[Any], dict[str, _gpu.Call]]
    bytes_of: Callable[..., int]
    positions: torch.Tensor
    outputs: Sequence[torch.Tensor]
    chosen: tuple[Any, ...]

    @classmethod
    def small(cls, shape: tuple[int, ...] = (33, 7)) -> Launch:
        """Return a launch whose outputs are as small as a shape allows."""
        return cls(*shape)

    def call(
        self, configuration: tuple[Any, ...] | None = None, *, gathered: bool = True, **variant: Any
    ) -> _gpu.Call:
        """Return our launch with checked arguments.

        Args:
            configuration: rows of a program, warps, and registers where the kernel limits them.
            gathered: cos and sin of the tokens were gathered once for all layers of a step.
            variant: keywords of the operator.
        """
        rope = (None, angles()[self.positions]) if gathered else (self.positions, angles())
        arguments = self.arguments(*rope, **variant)
        by_rows = "num_rows" in arguments
        names = "BLOCK_ROWS" if by_rows else "BLOCK_TOKENS", "num_warps", "maxnreg"
        options = dict(zip(names, configuration or self.chosen, strict=False))
        rows = arguments["num_rows" if by_rows else "num_tokens"]
        grid = (-(-rows // options[names[0]]),)
        return self.kernel.bind(grid, **arguments, **options, enable_fp_fusion=False)

    @classmethod
    def check_bytes(cls) -> None:
        """Compare every configuration with the CPU, byte by byte.

        Raises:
            AssertionError: they differ.
        """
        for configuration in cls.candidates:
            for variant in cls.variants:
                launch = cls.small()
                _gpu.poison(*launch.outputs)
                wanted = launch.expected(**variant)
                launch.call(configuration, gathered=False, **variant)()
                for found, want in zip(launch.outputs, wanted, strict=True):
                    # codes are compared as bits
                    found = found.view(torch.uint8) if want.dtype == np.uint8 else found
                    same = torch.equal(found.cpu(), torch.from_numpy(want).to(found.dtype))
                    assert same, f"bytes of {configuration} differ from the CPU's"

    @classmethod
    def compare(cls, record: _gpu.Recorder, peer: Any, shape: tuple[int, ...]) -> None:
        """Time all sides of one shape."""
        sets = [cls(*shape) for _ in range(_gpu.num_sets(cls.bytes_of(*shape)))]
        sides = [launch.sides(peer) | {OURS: launch.call()} for launch in sets]
        times = _gpu.interleaved({label: [side[label] for side in sides] for label in sides[0]})
        record.case(cls.name.format(*shape), times, ours=OURS, bytes_moved=cls.bytes_of(*shape))

    @classmethod
    def cases(cls, record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
        """Yield a case for each shape."""
        cls.check_bytes()
        peer = cls.find_peer and cls.find_peer(args.peers)
        for shape in cls.quick if args.quick else cls.shapes:
            yield cls.name.format(*shape), partial(cls.compare, record, peer, shape)

    @classmethod
    def subjects(cls) -> dict[str, tuple[_gpu.Call, Sequence[torch.Tensor]]]:
        """Return our launch at some shapes, for profiles and repeats."""
        made = [(name, cls.small(shape), variant) for name, shape, variant in cls.subjects_of]
        return {name: (launch.call(**variant), launch.outputs) for name, launch, variant in made}
