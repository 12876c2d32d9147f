"""What a conversion will write, settled and checked on the headers before a tensor is read or a byte written.

A plan is made of sources (tensors as somebody else named them) and items (tensors as we write them, each with the one
it comes from). Checking it means: every item's tensor is there in the expected shape and type, and no tensor of a source
is left over that is not on the list of what is left out on purpose.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from truepose_jax.config import UNetConfig
from truepose_jax.pretrained.conversion import from_torch, key_maps
from truepose_jax.pretrained.conversion.from_torch import Wanted
from truepose_jax.pretrained.conversion.key_maps import ModelKeys
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, TensorInfo, TensorSource

Tree = Mapping[str, Any]
"""Nested mappings of anything with shape and dtype."""


class Shapes(NamedTuple):
    """What our networks want, as trees of shapes; made where JAX may be imported. The functions raise ValueError for
    configurations of other models.

    truepose(unet, settings): the Method's parameters, by an export's truepose.json as far as it is there. autoencoder: of a
    diffusers config. clip: of a transformers config. paper(method, unet): the parameters of another method (None: not wanted).
    """

    truepose: Callable[[UNetConfig, Mapping[str, Any]], Tree]
    autoencoder: Callable[[Mapping[str, Any]], Tree]
    clip: Callable[[Mapping[str, Any]], Tree]
    paper: Callable[[str, UNetConfig], Tree] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors of one model. place: what an error calls it. files: what they are read from, by the name under which
    weights.json lists the hash."""

    place: str
    tensors: TensorSource
    keys: ModelKeys
    files: Mapping[str, Path]


class Item(NamedTuple):
    """One tensor of the result.

    name, shape: ours. tensor, expected: its canonical name and shape in the source; tensor "": zeros of the dtype of
    `like`. layout "ours": a parameter path, brought into our layout; "torch": as it is, save that 1x1 convolutions may
    have become matrices.
    """

    name: str
    shape: tuple[int, ...]
    source: Source
    tensor: str
    expected: tuple[int, ...]
    layout: Literal["ours", "torch"] = "ours"
    like: str = ""


def parameters(
    tree: Tree, source_of: Callable[[str], tuple[Source, str]], like: Callable[[str], str] = str
) -> list[Item]:
    """Items for the leaves of `tree`. source_of(path) -> (source, tensor; "" for zeros). like(path): see Item."""
    found = []
    for path, leaf in key_maps.leaves(tree):
        source, tensor = source_of(path)
        shape = tuple(leaf.shape)
        found.append(
            Item(path, shape, source, tensor, key_maps.torch_shape(path, shape), "ours", "" if tensor else like(path))
        )
    return found


def copies(tree: Tree, source: Source, name_of: Callable[[str], str] = str) -> list[Item]:
    """Items for a frozen network, kept in PyTorch's layout under its canonical names. name_of: canonical name -> its
    name in the source."""
    found = []
    for path, leaf in key_maps.leaves(tree):
        name, shape = key_maps.torch_name(path), key_maps.torch_shape(path, tuple(leaf.shape))
        found.append(Item(name, shape, source, name_of(name), shape, "torch"))
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """items: {file of the result: its tensors}. texts: {file: its text}. details: fields of weights.json. notes: lines for
    the report. not_read: {reason: count} of what a source holds beside tensors."""

    items: Mapping[str, list[Item]]
    texts: Mapping[str, str]
    details: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    not_read: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sources(self) -> list[Source]:
        """Each once, in the order of first use."""
        found = {id(item.source): item.source for items in self.items.values() for item in items}
        return list(found.values())

    def check(self) -> CheckedPlan:
        """Raises ConversionError that lists all that does not fit, of every source."""
        needs: dict[int, list[Wanted]] = {}
        for items in self.items.values():
            for item in items:
                wants = needs.setdefault(id(item.source), [])
                if item.tensor:
                    # Every one of the three types of weights fits into float32, and is kept as it is.
                    wants.append(Wanted(item.name, item.tensor, item.expected, np.dtype(np.float32)))
        names, problems = {}, []
        for source in self.sources:
            try:
                names[id(source)] = from_torch.match(source.tensors.infos, needs[id(source)], source.keys)
            except ConversionError as error:
                problems.append(f"{source.place}: {error}")
        if problems:
            raise ConversionError("\n".join(problems))
        return CheckedPlan(self, names)


@dataclasses.dataclass(frozen=True)
class CheckedPlan:
    """A plan of which every tensor is known to be there. names: {id of source: {canonical name: name in the source}}.
    not_finite: names of the tensors read so far that hold NaN or infinity."""

    plan: Plan
    names: Mapping[int, Mapping[str, str]]
    not_finite: list[str] = dataclasses.field(default_factory=list)

    def dtype(self, item: Item) -> np.dtype:
        return item.source.tensors.infos[self.name_in_source(item)].dtype

    def name_in_source(self, item: Item) -> str:
        return self.names[id(item.source)][item.tensor or item.like]

    def infos(self, file: str) -> dict[str, TensorInfo]:
        """{name: shape and dtype as written} of one file of the result."""
        return {item.name: TensorInfo(item.shape, self.dtype(item)) for item in self.plan.items[file]}

    def tensors(self, file: str) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of one file, one at a time, bit for bit those of the source."""
        for item in self.plan.items[file]:
            if not item.tensor:
                yield item.name, np.zeros(item.shape, self.dtype(item))
                continue
            array = item.source.tensors.read(self.name_in_source(item))
            if not np.isfinite(array).all():
                self.not_finite.append(item.name)
            ours = key_maps.our_layout(item.name, array) if item.layout == "ours" else array.reshape(item.shape)
            yield item.name, ours

    def bytes_of(self, file: str) -> int:
        return sum(info.dtype.itemsize * math.prod(info.shape) for info in self.infos(file).values())

    @property
    def bytes(self) -> int:
        return sum(self.bytes_of(file) for file in self.plan.items)

    @property
    def wrapped(self) -> dict[str, int]:
        """{prefix: count} of the tensors whose names were read without what torch.compile or DataParallel put before them."""
        names = (name for of_source in self.names.values() for name in of_source.values())
        return dict(collections.Counter(prefix for name in names if (prefix := key_maps.wrapping(name))))

    @property
    def left_out(self) -> dict[str, int]:
        """{reason: count} of the tensors that are left out on purpose."""
        counts = collections.Counter(self.plan.not_read)
        for source in self.plan.sources:
            counts.update(from_torch.ignored(source.tensors.infos, source.keys).values())
        return dict(counts)
