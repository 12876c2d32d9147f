"""What the programs do alike: the compiled programs that they keep."""

import pytest
from jax._src.lru_cache import LRUCache

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
