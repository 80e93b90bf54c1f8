"""Program of a process that compiles kernels for `fd_dsa.triton_runtime.compile_ahead`."""

from __future__ import annotations

from importlib import import_module

from fd_dsa.errors import describe_error
from fd_dsa.processes.child import connect_to_parent
from fd_dsa.processes.limits import expect_end
from fd_dsa.triton_runtime.compile_ahead import Order
from fd_dsa.triton_runtime.compiler import compile_kernel


def main() -> None:
    """Compile one kernel after another, until the parent is gone."""
    connection = connect_to_parent()
    expect_end()
    while True:
        try:
            order = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_compile(order))


def _compile(order: Order) -> str:
    """Compile a kernel into Triton's cache on disk. Returns the error, or ""."""
    try:
        fn = getattr(import_module(order.module), order.name).fn
        # otherwise Triton 3.6 makes a key that depends on the kernels of this process so far
        fn.hash = order.source_key
        compile_kernel(fn, order.arguments, order.options, order.capability)
    except Exception as error:
        # Triton's compiler raises errors of many types
        return describe_error(error)
    return ""


if __name__ == "__main__":
    main()
