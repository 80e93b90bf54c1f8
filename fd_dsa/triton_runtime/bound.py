"""Launches of one kernel on buffers that never move: everything is checked and packed once."""

from __future__ import annotations

import struct

from fd_dsa.errors import LaunchError
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import DeviceApi
from fd_dsa.triton_runtime.grid import Grid, resolve_grid
from fd_dsa.triton_runtime.variant import Frame, Variant


class BoundLaunch:
    """A launch with bound arguments; made by `Kernel.bind`.

    A call costs the look-up of the current stream and one call of the driver. Calls from several
    threads are safe; a value given for a scalar holds for that call only.

    Attributes:
        variant: the compiled kernel that it launches.
        grid: three numbers of programs.
    """

    def __init__(
        self,
        api: DeviceApi,
        variant: Variant,
        grid: Grid,
        values: dict[str, object],
        options: dict[str, object],
        scalars: tuple[str, ...] = (),
    ) -> None:
        self.variant, self._api, self._options = variant, api, options
        self._values, self._scalars = values, scalars
        self._grid_function = grid if callable(grid) else None
        self.grid = self._resolve(grid, values)
        self._stream, self._device = api.current_stream, variant.device
        self._queue, self._grid_offset = variant.queue, variant.grid_offset
        self._fixed_grid = self._grid_function is None and 0 not in self.grid
        passed = [parameter.name for parameter in variant.passed]
        self._writers = tuple(
            (
                struct.Struct(f"={variant.compiled.codes[index]}").pack_into,
                variant.offsets[index],
            )
            for index in map(passed.index, scalars)
        )
        self._bound_scalars = tuple(values[name] for name in scalars)
        self._write_grid = struct.Struct("=III").pack_into
        self._free: list[Frame] = []

    def _resolve(self, grid: Grid, values: dict[str, object]) -> tuple[int, int, int]:
        return resolve_grid(self.variant.signature.kernel, grid, values, self._options)

    def __call__(self, *scalars: object, grid: Grid | None = None) -> None:
        """Launch on the current stream.

        Args:
            scalars: values of the scalars that were named when the launch was bound, all or none.
            grid: another grid for this call.

        Raises:
            LaunchError: the number or the type of the scalars is wrong.
            DeviceError: the driver refuses the launch.
        """
        # one body for all calls: another function would cost as much as the rest of this one
        if grid is None and self._fixed_grid:
            numbers = self.grid
        else:
            grid, values = grid or self._grid_function or self.grid, self._values
            if callable(grid):
                values = values | dict(zip(self._scalars, scalars, strict=False))
            numbers = self._resolve(grid, values)
            if 0 in numbers:
                return
        free = self._free
        try:
            frame = free.pop()
        except IndexError:
            frame = self.variant.frame(self._values)
        if self._writers:
            try:
                for (write, offset), value in zip(
                    self._writers, scalars or self._bound_scalars, strict=True
                ):
                    write(frame.memory, offset, value)
            except (struct.error, ValueError) as error:
                raise self._unfit(scalars, error) from None
        elif scalars:
            raise self._unfit(scalars, "it has none")
        if numbers is not frame.grid:
            frame.grid = numbers
            self._write_grid(frame.memory, self._grid_offset, *numbers)
        stream = self._stream(self._device)
        if stream != frame.stream:
            frame.set_stream(stream)
        code = self._queue(*frame.call)
        if code:
            self.variant.recover(code, frame)
        free.append(frame)

    def _unfit(self, scalars: tuple[object, ...], why: object) -> LaunchError:
        """The error for scalars that are too many, too few or of another type."""
        kinds = ", ".join(f"{n}: {self.variant.arguments[n].type}" for n in self._scalars)
        return LaunchError(
            f"kernel {self.variant.signature.kernel}: {scalars} do not fit the scalars of the "
            f"bound launch ({kinds}): {why}"
        )

    def exchange(self, **tensors: Tensor) -> None:
        """Replace bound tensors, all or none; each is checked as at binding.

        Raises:
            LaunchError: dtype, device or alignment is not what the kernel was compiled for.
        """
        signature, values = self.variant.signature, {**self._values, **tensors}
        for name, tensor in tensors.items():
            if not hasattr(self._values.get(name), "data_ptr"):
                raise LaunchError(f"kernel {signature.kernel}: no tensor is bound to {name!r}")
            if not hasattr(tensor, "data_ptr"):
                problem = f"is a {type(tensor).__name__}; a tensor is bound there"
                raise signature.error(name, problem)
            bound = self.variant.arguments[name]
            new = signature.describe(signature.parameters[name], tensor)
            device = signature.device_of(name, tensor, self._api)
            if new.type != bound.type or device != self._device:
                raise signature.error(
                    name,
                    f"is {new.type} on device {device}, bound is {bound.type} on device "
                    f"{self._device}",
                )
            if bound.divisible and not new.divisible:
                raise signature.error(
                    name,
                    "starts at an address that 16 does not divide, unlike the bound tensor; bind a "
                    "launch of its own for it",
                )
        # calls under way give their frames back to the list that they took
        self._values, self._free = values, []
