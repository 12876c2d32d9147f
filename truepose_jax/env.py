"""What a report of a fault needs: versions, devices, the cache of compiled programs, disk.

python -m truepose_jax.env
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence

import truepose_jax
from truepose_jax.runtime import bundled
from truepose_jax.runtime.cli import Parser, enable_compilation_cache, program

PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "pillow",
    "opencv-python-headless", "safetensors", "tensorflow-datasets", "torch", "diffusers", "transformers",
)  # fmt: skip
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "CUDA_VISIBLE_DEVICES", "TPU_", "SLURM_PROCID", "SLURM_NTASKS")
"""Beginnings of names of environment variables that change what a program does."""
GIB = 1 << 30


@program
def main(argv: Sequence[str]) -> None:
    Parser.of_program("env", __doc__).parse_args(argv)
    for name, value in facts():
        print(f"{name + ':':26}{value}", flush=True)


def facts() -> Iterator[tuple[str, str]]:
    """(name, value) of each line; the devices last, for they take longest and may hang."""
    yield "truepose-jax", f"{truepose_jax.__version__}, {pathlib.Path(truepose_jax.__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPU cores"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "configs", ", ".join(bundled.config_names())
    yield "models", ", ".join(bundled.model_names()) or "none"
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            yield name, value
    yield "free here", f"{shutil.disk_usage('.').free / GIB:.1f} GiB in {pathlib.Path.cwd()}"

    import jax

    enable_compilation_cache()
    yield "compiled programs", _cache(jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)
    try:
        devices = jax.devices()
    except RuntimeError as error:  # of a backend that cannot start
        yield "devices", f"none ({' '.join(str(error).split())})"
        return
    yield "process", f"{jax.process_index()} of {jax.process_count()}"
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        memory = f", {limit / GIB:.1f} GiB" if limit else ""
        yield f"device {device.id}", f"{device.device_kind} ({device.platform}){memory}"


def _cache(folder: str | None, enabled: bool) -> str:
    if not enabled or not folder:
        return "not kept"
    files = [path.stat().st_size for path in pathlib.Path(folder).glob("*-cache")]
    return f"{len(files)}, {sum(files) / GIB:.2f} GiB in {folder}"


if __name__ == "__main__":
    sys.exit(main())
