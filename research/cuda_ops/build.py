"""Compile the fp8 operators into one shared library that loads without a GPU and without cublasLt.

The CUDA runtime is linked in; cublasLt 13 is looked for when an operator first runs. Needs nvcc of
CUDA 13, the cublasLt header (with nvcc or given) and the C headers of ONNX Runtime (`onnxruntime_c_api.h`; 1.29 or
newer in the tested build, and not newer than the runtime that loads the library).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fp8_ops.cu")
TARGETS = ("arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")  # Hopper, and PTX for what comes after


def command(nvcc: Path, includes: list[Path], out: Path) -> list[str]:
    """Return the nvcc command line; `includes` hold the headers of ONNX Runtime and cublasLt."""
    flags = ["-O3", "-std=c++17", "-shared", "-cudart", "static", "--threads", "2"]
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter"
    line = [str(nvcc), *flags, "-Xcompiler", host]
    for target in TARGETS:
        line += ["-gencode", target]
    for include in includes:
        line += ["-I", str(include)]
    line += ["-L", str(nvcc.parent.parent / "lib")]  # where the pip wheels keep the static runtime
    line += ["-Xlinker", "-Bsymbolic", "-ldl", "-lpthread", "-lrt"]
    return [*line, "-o", str(out), str(SOURCE)]


def build(nvcc: Path, includes: list[Path], out: Path) -> Path:
    """Compile into `out` and return it.

    Raises:
        subprocess.CalledProcessError: nvcc reports an error (its text is on stderr).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command(nvcc, includes, out), check=True)
    return out


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nvcc", type=Path, default=Path(shutil.which("nvcc") or "nvcc"))
    parser.add_argument("--ort-include", type=Path, required=True, help="folder that holds onnxruntime_c_api.h")
    parser.add_argument("--cublas-include", type=Path, help="folder that holds cublasLt.h, where nvcc does not find it")
    parser.add_argument("--out", type=Path, default=Path("libqexport_fp8.so"))
    options = parser.parse_args()
    includes = [options.ort_include] + ([options.cublas_include] if options.cublas_include else [])
    built = build(options.nvcc, includes, options.out)
    print(f"{built}: {built.stat().st_size} bytes")


if __name__ == "__main__":
    main()
