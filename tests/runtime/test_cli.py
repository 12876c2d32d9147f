"""What the programs do alike: the compiled programs that they keep, and one line for bad input."""

import numpy as np
import pytest
from jax._src.lru_cache import LRUCache
from PIL import Image

from tests.process import of_code
from truepose_jax.runtime.cli import drop_half_written


def test_what_a_killed_start_left_of_a_program_is_dropped(tmp_path):
    """JAX's own cache would keep nothing more for it."""
    cache = LRUCache(str(tmp_path), max_size=100)
    cache.put("whole", b"1234")
    (tmp_path / "half-cache").write_bytes(b"12")
    with pytest.raises(FileNotFoundError):
        cache.put("next", b"5678")
    drop_half_written(tmp_path)
    cache.put("next", b"5678")
    assert {path.name for path in tmp_path.glob("*-cache")} == {"whole-cache", "next-cache"}
    assert cache.get("whole") == b"1234"


def test_a_photo_too_large_is_one_line_in_a_program_and_no_filter_of_a_library(tmp_path):
    Image.fromarray(np.zeros((10_000, 10_000), bool)).save(tmp_path / "a.png")
    code = """
        import sys, warnings
        from PIL import Image
        from input_pipeline.annotations.photo import read_photo
        assert not any(rule[2] is Image.DecompressionBombWarning for rule in warnings.filters)
        from truepose_jax.runtime.cli import run_program
        sys.exit(run_program(lambda argv: read_photo(argv[0]), sys.argv[1:]))
    """
    ended, out, errors = of_code(code, tmp_path / "a.png").finish()
    assert (ended, out, len(errors.splitlines())) == (2, "", 1) and "10000" in errors, errors
