"""Finds and installs the compilers of TPUs and of NVIDIA GPUs: `python -m recollect.pallas_kernels.compilers tpu` (or
cuda).

They are kept out of the environment that trains, which would otherwise look for devices on every start. Each jax
version needs its own: libtpu refuses the modules of a newer jax. jax has plugins for CUDA 12 and for CUDA 13: up to
0.10 we compile with the former, from 0.11 on with the latter, so that CI, which runs both versions, has both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

Compiler = Literal["tpu", "cuda"]

VARIABLES: dict[Compiler, str] = {"tpu": "RECOLLECT_LIBTPU", "cuda": "RECOLLECT_CUDA"}
"""Environment variables that name other folders than those under .accelerators/."""

TARGETS: dict[Compiler, str] = {"tpu": "make libtpu", "cuda": "make cuda-compiler"}

_CUDA = 13 if jax.version.__version_info__ >= (0, 11) else 12

# Within the folder; a pattern has one match.
_FILES: dict[Compiler, tuple[str, ...]] = {
    "tpu": ("libtpu/libtpu.so",),
    "cuda": (
        "jax_plugins/xla_cuda*/xla_cuda_plugin.so",
        "jax_cuda*_plugin/libmosaic_gpu_runtime.so",
        "nvidia/*/bin/ptxas",
    ),
}


class NotInstalled(RuntimeError):
    """The compiler of a chip is not on this machine."""


def folder(compiler: Compiler) -> Path:
    """Returns the folder of a compiler, installed or not."""
    named = os.environ.get(VARIABLES[compiler])
    name = {"tpu": "libtpu", "cuda": "cuda" if _CUDA == 12 else f"cuda{_CUDA}"}[compiler]
    return Path(named) if named else Path(__file__).resolve().parents[1] / ".accelerators" / f"{name}-{jax.__version__}"


def files(compiler: Compiler) -> list[Path]:
    """Returns the compiler's files, in its folder (or, of libtpu, in this environment).

    "tpu" is the library; "cuda" is XLA's plugin, the runtime of Mosaic GPU and ptxas.

    Raises:
      NotInstalled: one is missing; the message says what installs it.
    """
    paths: list[Path | None] = [next(iter(folder(compiler).glob(pattern)), None) for pattern in _FILES[compiler]]
    installed = importlib.util.find_spec("libtpu") if compiler == "tpu" and VARIABLES["tpu"] not in os.environ else None
    if paths == [None] and installed is not None and installed.origin is not None:
        paths = [Path(installed.origin).with_name("libtpu.so")]
    present = [path for path in paths if path is not None]
    if len(present) < len(paths):
        name = {"tpu": "libtpu", "cuda": "XLA's CUDA plugin with ptxas"}[compiler]
        raise NotInstalled(f"{name} is not in {folder(compiler)}: `{TARGETS[compiler]}` installs it")
    return present


def packages(compiler: Compiler) -> list[str]:
    """Returns what pip installs into the folder: of libtpu the version that this jax names, of the CUDA plugin this
    jax's own.

    Kernels are compiled by what the plugin holds of ptxas; jax asks the program for its version. XLA needs libdevice,
    which is in a package of its own from CUDA 13 on.
    """
    if compiler == "cuda":
        tools = ["nvidia-cuda-nvcc-cu12"] if _CUDA == 12 else ["nvidia-cuda-nvcc==13.0.*", "nvidia-nvvm==13.0.*"]
        return [f"jax-cuda{_CUDA}-plugin=={jax.__version__}", f"jax-cuda{_CUDA}-pjrt=={jax.__version__}", *tools]
    requirements = [line for line in importlib.metadata.requires("jax") or [] if re.match(r"libtpu\b", line)]
    return [requirements[0].split(";")[0].strip() if requirements else "libtpu"]


def install(compiler: Compiler) -> None:
    """Installs it unless it is there.

    Raises:
      NotInstalled: pip could not; the message holds pip's errors.
    """
    try:
        files(compiler)
        return
    except NotInstalled:
        pass
    print(f"installing {', '.join(packages(compiler))} into {folder(compiler)}", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--upgrade",
    ]
    done = subprocess.run(
        [*command, "--target", str(folder(compiler)), *packages(compiler)], capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[
            -1:
        ]
        raise NotInstalled(f"{', '.join(packages(compiler))} could not be installed: {' '.join(errors)[:500]}")
    files(compiler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 1 where the compiler could not be installed, unless --optional."""
    parser = argparse.ArgumentParser(
        prog="python -m recollect.pallas_kernels.compilers",
        description="Installs the compiler of a chip where it is missing.",
    )
    parser.add_argument("compiler", choices=tuple(TARGETS))
    parser.add_argument("--optional", action="store_true", help="say why it could not be installed, and succeed")
    options = parser.parse_args(arguments)
    try:
        install(options.compiler)
    except NotInstalled as error:
        print(f"{'note' if options.optional else 'error'}: {error}", file=sys.stderr)
        return 0 if options.optional else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
