"""Settings of every test process, made before JAX starts."""

import mmap
import os
import pathlib
import tempfile

import jaxlib
import pytest

SLOW_EMITTERS = "xla_cpu_use_fusion_emitters"


def quick_flags() -> str:
    """Most of the suite's time is compilation. Without optimisation and fusion emitters XLA needs a third of it."""
    libraries = pathlib.Path(jaxlib.__file__).parent.glob("libjax_common*")
    words = (mmap.mmap(os.open(library, os.O_RDONLY), 0, access=mmap.ACCESS_READ) for library in libraries)
    known = any(each.find(SLOW_EMITTERS.encode()) >= 0 for each in words)  # XLA ends where a flag is unknown to it
    return "--xla_backend_optimization_level=0" + f" --{SLOW_EMITTERS}=false" * known


os.environ.setdefault("XLA_FLAGS", quick_flags())
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing is kept between runs of the tests, nor in anybody's home. Tests that start programs let them share the folder of
# this run (tests/process.py).
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="truepose_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name

LONGEST = (
    "test_killed", "test_truepose", "test_ablations", "test_truepose_torch", "test_unet", "test_annotate", "test_generate",
    "test_memory", "test_sharding", "test_init", "test_carry_method", "test_generate_records", "test_full_size", "test_pipeline",
)  # fmt: skip
"""Files of most seconds. They come first (pyproject.toml: files in this order), so that no worker begins one when the other
has nothing left to do."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def started_quickly():
    """For modules that load programs and are not about speed (tests/tiny_run.py)."""
    from tests.tiny_run import quick_starts

    with quick_starts():
        yield
