"""PyTorch tensors to our parameter trees: strict, one tensor at a time.

The target tree says what is wanted (names, shapes, dtypes). Everything is checked on the headers, before a
tensor is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, TensorInfo, TensorSource, open_source

LISTED = 20
"""Names of a kind that an error prints before it only counts."""

_EXACT = {
    np.dtype(np.float16): {np.dtype(np.float16), np.dtype(np.float32)},
    np.dtype(ml_dtypes.bfloat16): {np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)},
    np.dtype(np.float32): {np.dtype(np.float32)},
}
"""tensor dtype -> parameter dtypes that hold each of its values."""


class Wanted(NamedTuple):
    """One parameter: the tensor it comes from, with the shape that tensor must have, and our dtype."""

    path: str
    tensor: str
    shape: tuple[int, ...]
    dtype: np.dtype


def wanted(target: Mapping[str, Any], name_of: Callable[[str], str] = key_maps.torch_name) -> list[Wanted]:
    """What the leaves of `target` (anything with shape and dtype) need. Several may need the same tensor."""
    return [
        Wanted(path, name_of(path), key_maps.torch_shape(path, tuple(leaf.shape)), np.dtype(leaf.dtype))
        for path, leaf in key_maps.leaves(target)
    ]


def match(infos: Mapping[str, TensorInfo], needs: list[Wanted], keys: ModelKeys) -> dict[str, str]:
    """{canonical tensor name: its name in the source}, after checking that everything fits.

    Every tensor must be needed or be on the ignore list; every need must be met, by the right shape and by a
    dtype that the parameter's dtype holds exactly. Raises ConversionError that lists all that is wrong.
    """
    names: dict[str, str] = {}
    twice = []
    for name in infos:
        if keys.reason_to_ignore(name):
            continue
        canonical = keys.canonical(name)
        if canonical in names:
            twice.append(f"{name} and {names[canonical]} are both {canonical}")
        names[canonical] = name
    missing, misshapen, mistyped = {}, {}, {}
    for need in needs:
        if need.tensor not in names:
            missing[need.tensor] = f"{need.tensor} {list(need.shape)}"
            continue
        shape, dtype = infos[names[need.tensor]]
        if shape != need.shape:
            misshapen[need.tensor] = f"{need.tensor} is {list(shape)}, expected {list(need.shape)}"
        elif need.dtype not in _EXACT.get(dtype, ()):
            mistyped[need.tensor] = f"{need.tensor} is {dtype}, which {need.dtype} does not hold exactly"
    known = {need.tensor for need in needs}
    unexpected = [f"{name} {list(infos[name].shape)}" for c, name in names.items() if c not in known]
    problems = {
        "missing": list(missing.values()),
        "unexpected": unexpected,
        "of another shape": list(misshapen.values()),
        "of another type": list(mistyped.values()),
        "given twice": twice,
    }
    if any(problems.values()):
        raise ConversionError(_report(problems, keys, infos))
    return names


def _report(problems: dict[str, list[str]], keys: ModelKeys, infos: Mapping[str, TensorInfo]) -> str:
    lines = [f"these weights are not the expected {keys.title}"]
    stranger = keys.recognise({keys.canonical(name): info.shape for name, info in infos.items()})
    if stranger:
        lines[0] += f": they are {stranger}"
    for kind, found in problems.items():
        if found:
            lines.append(f"{len(found)} tensors {kind}:")
            lines += [f"  {line}" for line in found[:LISTED]]
            if len(found) > LISTED:
                lines.append(f"  ... and {len(found) - LISTED} more")
    return "\n".join(lines)


def stream(source: TensorSource, needs: list[Wanted], keys: ModelKeys) -> Iterator[tuple[str, np.ndarray]]:
    """(path, parameter in our layout and dtype), one at a time. Raises ConversionError before the first."""
    names = match(source.infos, needs, keys)

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for need in needs:
            array = key_maps.our_layout(need.path, source.read(names[need.tensor]))
            # A copy even where nothing changes: parameters never share memory with their source.
            yield need.path, np.array(array, dtype=need.dtype, order="C")

    return read()


def load(
    src: TensorSource | Mapping[str, np.ndarray] | str | os.PathLike,
    target: Mapping[str, Any],
    keys: ModelKeys,
    variant: str | None = None,
) -> dict[str, Any]:
    """The parameter tree of `target`'s structure, shapes and dtypes, from one model's weights.

    src: a state dict of numpy arrays, a safetensors file, a shard index or a folder. target: nested mappings
    of anything with shape and dtype (jax.ShapeDtypeStruct). Memory: the result and one tensor.
    """
    return key_maps.nest(dict(stream(open_source(src, variant), wanted(target), keys)))


def ignored(infos: Mapping[str, TensorInfo], keys: ModelKeys) -> dict[str, str]:
    """{tensor name: why it is left out}, to be printed."""
    reasons = {name: keys.reason_to_ignore(name) for name in infos}
    return {name: reason for name, reason in reasons.items() if reason}
