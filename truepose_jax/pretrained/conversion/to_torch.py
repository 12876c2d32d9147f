"""Our parameter trees to PyTorch tensors: the exact inverse of from_torch, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, TensorInfo, write_safetensors

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""What tensors can be written as; None keeps each parameter's own."""


def infos(
    params: Mapping[str, Any], dtype: str | None = None, name_of: Callable[[str], str] = key_maps.torch_name
) -> dict[str, TensorInfo]:
    """{tensor name: shape and dtype in PyTorch}, in the tree's order. ConversionError for a repeated name."""
    found: dict[str, TensorInfo] = {}
    for path, leaf in key_maps.leaves(params):
        name = name_of(path)
        if name in found:
            raise ConversionError(f"{path} and another parameter are both {name} in PyTorch")
        kept = DTYPES[dtype] if dtype else np.dtype(leaf.dtype)
        found[name] = TensorInfo(key_maps.torch_shape(path, tuple(leaf.shape)), kept)
    return found


def stream(
    params: Mapping[str, Any], dtype: str | None = None, name_of: Callable[[str], str] = key_maps.torch_name
) -> Iterator[tuple[str, np.ndarray]]:
    """(tensor name, array in PyTorch's layout), one at a time.

    Leaves may be jax arrays; each is brought to the host when its turn comes. Raises ConversionError where a
    finite parameter is beyond the range of `dtype` (float16 ends at 65504).
    """
    for path, leaf in key_maps.leaves(params):
        array = np.asarray(leaf)
        kept = DTYPES[dtype] if dtype else array.dtype
        with np.errstate(over="ignore"):
            tensor = np.asarray(key_maps.torch_layout(path, array), dtype=kept, order="C")
        if kept.itemsize < array.dtype.itemsize and not np.isfinite(tensor).all() and np.isfinite(array).all():
            raise ConversionError(f"{path} reaches {np.abs(array).max():.4g}, beyond the range of {kept}")
        yield name_of(path), tensor


def save(params: Mapping[str, Any], path: Path, dtype: str | None = None) -> None:
    """One safetensors file that diffusers and transformers open. Memory: one tensor beyond `params`."""
    write_safetensors(path, infos(params, dtype), stream(params, dtype))
