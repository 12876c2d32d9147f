"""Named random streams: one root key per run, one key per (stream, step)."""

from __future__ import annotations

import hashlib

import jax


def _number(name: str) -> int:
    # Not hash(): that one differs from process to process.
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def key(root: jax.Array, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of `stream` at `step`; streams and steps never share one."""
    return jax.random.fold_in(jax.random.fold_in(root, _number(stream)), step)


def key_of_name(root: jax.Array, name: str) -> jax.Array:
    """The key of a named thing (an image pair), whatever the order or the batch in which it comes."""
    return key(root, f"name:{name}")
