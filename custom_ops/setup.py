"""The build of fd_dsa_ops for the installed Paddle.

The CUDA kernels are built where that Paddle has CUDA and the machine has nvcc. Elsewhere the
package holds the plain C++ operators only.

    pip install ./custom_ops                        # setuptools comes from the package index
    pip install --no-build-isolation ./custom_ops   # needs setuptools here, and no network

Source: the documentation of paddle.utils.cpp_extension.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext

# pip runs this file from another folder, and the sources of the package would hide a built one
sys.path.insert(0, str(Path(__file__).parent))
import build_library as kernels

sys.path.pop(0)

NAME = "fd_dsa_ops"
# with the -g of Python's own flags, the build takes several times as long
CXX_FLAGS = ["-O2", "-g0", "-std=c++17"]
# A compiler may have libstdc++ as an archive only. The library would then hold its own copy beside
# Paddle's, and an error of Paddle that prints a line number would end the process.
LINK_FLAGS = ["-l:libstdc++.so.6"]
INSTEAD = "Triton's kernels serve top-k and sparse MLA on GPUs"


def import_paddle() -> tuple[Any, Any]:
    """Import Paddle and its build tools.

    pip builds in a folder of its own, which hides the packages of the target environment. Their
    folders are therefore added after pip's.
    """
    for kind in ("purelib", "platlib"):
        folder = sysconfig.get_path(kind)
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        import paddle
        from paddle.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"{NAME}: Paddle cannot be imported here ({error}). The operators are built for the "
            "Paddle that is installed: install it first, then "
            f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation "
            f"{shlex.quote(str(Path(__file__).resolve().parent))}"
        )
    return paddle, cpp_extension


def find_reason_without_kernels(paddle: Any, cuda_home: str | None) -> str:
    """Return why no CUDA kernels can be built, or "" where they can."""
    if not paddle.is_compiled_with_cuda():
        return "this Paddle has no CUDA"
    if kernels.find_nvcc() is None:
        return "no nvcc"
    if cuda_home is None or not Path(cuda_home, "include", "cuda_runtime.h").is_file():
        return f"{cuda_home} has no include/cuda_runtime.h; set CUDA_HOME to a CUDA toolkit"
    return ""


def build_command(tools: Any, info: dict[str, Any], reason: str) -> type:
    """Return Paddle's build command without the Python file that it writes.

    The package has a Python file of its own.

    Args:
        info: the facts about the build that build.json keeps.
        reason: why the build has no CUDA kernels, or "".
    """

    class Build(tools.BuildExtension):
        def run(self) -> None:
            # setuptools does not see that a header has changed
            self.force = True
            [extension] = self.extensions
            package = Path(self.get_ext_fullpath(extension.name)).parent
            package.mkdir(parents=True, exist_ok=True)
            try:
                if not reason:
                    shutil.copy(kernels.build_library(), package)
                    extension.library_dirs.append(str(package))
                build_ext.run(self)
            except Exception as error:
                # Paddle only prints that a compiler failed, and the linker then raises the error
                print(error)
                first = str(error).partition("\n")[0][:200]
                sys.exit(
                    f"{NAME}: not built; the compiler's output is above. fd_dsa works without "
                    f"the operators, on its Triton kernels ({type(error).__name__}: {first})"
                )
            (package / "build.json").write_text(json.dumps(info) + "\n", "utf-8")
            # Paddle leaves these files in the folder that is installed
            for pattern in ("*.o", "version.txt"):
                for path in Path(self.build_lib).rglob(pattern):
                    path.unlink()
            if reason:
                print(f"{NAME}: built without CUDA kernels ({reason}); {INSTEAD}")

    return Build


def main() -> None:
    """Run the commands that setuptools was given."""
    paddle, tools = import_paddle()
    info: dict[str, Any] = {"paddle": paddle.__version__, "cuda": None, "archs": []}
    extension, flags, links = tools.CppExtension, list(CXX_FLAGS), list(LINK_FLAGS)
    reason = find_reason_without_kernels(paddle, tools.cpp_extension.CUDA_HOME)
    if not reason:
        archs = kernels.known_archs(str(kernels.find_nvcc()))
        info |= {"cuda": paddle.version.cuda(), "archs": [f"sm_{arch}" for arch in archs]}
        extension = tools.CUDAExtension
        flags.append("-DPADDLE_WITH_CUDA")
        links += [f"-l:{kernels.LIBRARY}", "-Wl,-rpath,$ORIGIN"]
    module = extension(
        sorted(str(path) for path in Path().glob("*.cc")),
        name=f"{NAME}.lib{NAME}",
        extra_compile_args={"cxx": flags},
        extra_link_args=links,
    )
    setup(ext_modules=[module], cmdclass={"build_ext": build_command(tools, info, reason)})


if __name__ == "__main__":
    main()
