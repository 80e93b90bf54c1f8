"""One compiled and loaded form of a kernel, and its launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_dsa.triton_runtime.compiler import Argument, Compiled
from fd_dsa.triton_runtime.device import DeviceApi, api_for_type
from fd_dsa.triton_runtime.driver import Driver
from fd_dsa.triton_runtime.frame import Frame, Layout
from fd_dsa.triton_runtime.parameters import Parameter, Signature

# invalid context, and a function or stream that is not of the current context
_WRONG_CONTEXT = (201, 400, 709)


class Variant:
    """A loaded kernel for fixed dtypes, alignments, constants, options and device.

    Attributes:
        device: index of the device that it is loaded on.
        compiled, function: what the compiler and the driver say about it.
        passed: the parameters whose values a launch passes, in order.
        free: frames that no launch uses now.
    """

    def __init__(
        self,
        signature: Signature,
        arguments: Mapping[str, Argument],
        options: Mapping[str, Any],
        compiled: Compiled,
        function: int,
        device: int,
        driver: Driver,
    ) -> None:
        self.signature, self.arguments, self.device = signature, arguments, device
        self.compiled, self.function, self.driver = compiled, function, driver
        self.layout = Layout(
            compiled,
            function,
            cooperative=bool(options["launch_cooperative_grid"]),
            overlap_launches=bool(options["launch_pdl"]),
        )
        self.free: list[Frame] = []
        self.passed: list[Parameter] = [
            parameter
            for parameter in signature.parameters
            if arguments[parameter.name].type != "constexpr"
        ]

    def pack(self, frame: Frame, values: Mapping[str, Any], grid: tuple[int, int, int]) -> None:
        """Write all arguments and the grid into a frame."""
        plain = [
            value.data_ptr() if hasattr(value, "data_ptr") else value
            for value in (values[parameter.name] for parameter in self.passed)
        ]
        x, y, z = grid
        self.layout.values.pack_into(frame.memory, 0, *plain, x * self.layout.num_ctas, y, z)

    def launch(self, api: DeviceApi, values: Mapping[str, Any], grid: tuple[int, int, int]) -> None:
        """Launch with values that were found to fit this variant."""
        if 0 in grid:
            return
        frame = self.free.pop() if self.free else self.layout.frame()
        self.pack(frame, values, grid)
        stream = api.current_stream(self.device)
        if frame.stream != stream:
            frame.set_stream(stream)
        code = self.driver.launch(*frame.call)
        if code:
            self.recover(code, frame)
        self.free.append(frame)

    def recover(self, code: int, frame: Frame) -> None:
        """Launch again if it failed because another context, or none, is the thread's.

        A thread without a context gets the device's; another context is put back afterwards.

        Raises:
            DeviceError: any other error of the launch, or of earlier work on the device.
        """
        if code in _WRONG_CONTEXT:
            with self.driver.context(self.device):
                code = self.driver.launch(*frame.call)
        self.driver.check(code, f"launch of kernel {self.signature.kernel}")

    def accepts(self, parameter: Parameter, tensor: Any, address: int, api: DeviceApi) -> bool:
        """True if a tensor at this address can be given for a parameter."""
        wanted = self.arguments[parameter.name]
        if api_for_type(type(tensor)) is not api:
            return False
        found = "*" + self.signature.check_tensor(parameter, tensor)
        return (
            found == wanted.type
            and (parameter.specialize_alignment and address % 16 == 0) == wanted.divisible
            and self.signature.device_of(parameter, tensor, api) == self.device
        )
