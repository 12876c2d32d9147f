"""Settings of every test process, made before JAX starts."""

import gc
import mmap
import os
import pathlib
import tempfile

import jaxlib
import pytest

QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def quick_flags() -> str:
    """Most of the suite's time is compilation, and with these XLA needs a third of it."""
    libraries = pathlib.Path(jaxlib.__file__).parent.glob("libjax_common*")
    words = [mmap.mmap(os.open(library, os.O_RDONLY), 0, access=mmap.ACCESS_READ) for library in libraries]
    known = [flag for flag in QUICK if any(each.find(b"\0%s\0" % flag.encode()) >= 0 for each in words)]
    return " ".join(f"--{flag}={QUICK[flag]}" for flag in known)


os.environ.setdefault("XLA_FLAGS", quick_flags())
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(100_000, 50, 100)  # tracing makes many small objects that stay; looking for dead ones was 1/8
# Nothing is kept between runs of the tests, nor in anybody's home. Tests that start programs let them share the folder of
# this run (tests/process.py).
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="truepose_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name

LONGEST = (
    "test_killed", "test_contract", "test_train_papers", "test_ablations", "test_step", "test_truepose_torch", "test_checkpoint",
    "test_truepose", "test_animate_anyone", "test_evaluate", "test_generate", "test_unet", "test_attention", "test_flops",
    "test_papers_torch", "test_generate_canvas", "test_sharding", "test_wheel", "test_generate_records", "test_carry_method",
    "test_annotate", "test_memory", "test_contrastive", "test_scaling",
)  # fmt: skip
"""Files of most seconds. They come first (pyproject.toml: files in this order), so that no worker begins one when the other
has nothing left to do."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    gc.freeze()  # what was imported stays


@pytest.fixture
def refuses(capsys):
    """refuses(words, main, *flags): the program ends with 2 and one line on stderr, which has `words`; the line."""
    from tests.process import code_of

    def check(words, main, *flags) -> str:
        capsys.readouterr()
        assert code_of(main, *flags) == 2, flags
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, (flags, error)
        return error

    return check


@pytest.fixture(scope="module")
def started_quickly():
    """For modules that load programs and are not about speed (tests/tiny_run.py)."""
    from tests.tiny_run import quick_starts

    with quick_starts():
        yield
