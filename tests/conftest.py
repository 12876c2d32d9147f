"""Settings of every test process, made before JAX starts."""

import os
import pathlib

import pytest

# Most of the suite's time is compilation; unoptimised machine code computes the same and compiles in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing is kept between runs of the tests, nor in anybody's home; tests that start a program twice say so themselves.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

LONGEST = (
    "resume/test_killed.py",
    "test_multihost.py",
    "parity/test_unet.py",
    "parity/test_truepose_torch.py",
    "test_ablations.py",
    "test_truepose.py",
    "test_estimate.py",
    "test_generate.py",
    "test_full_size.py",
    "test_annotate.py",
    "test_initial.py",
    "test_sharding.py",
)
"""Files of most seconds. They come first (pyproject.toml: files in this order), so that no worker begins one when the other
has nothing left to do."""


def pytest_collection_modifyitems(items):
    here = pathlib.Path(__file__).parent

    def place(item):
        name = item.path.relative_to(here).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="module")
def started_quickly():
    """For modules that load programs and are not about speed (tests/tiny_run.py)."""
    from tests.tiny_run import quick_starts

    with quick_starts():
        yield
