"""The starting points of FPDM and IMAGPose: their UNets out of a Stable Diffusion. Everything else of theirs begins random."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.plan import Item, Source, Tree, parameters
from truepose_jax.pretrained.conversion.truepose_names import block_of_site

OF_UNET = ("unet", "context")
"""Networks that come out of one UNet; `context` holds attn2's keys and values."""


def unet_tensor(path: str) -> str:
    """diffusers' name of the tensor that the parameter at `path` begins as."""
    network, _, inside = path.partition("/")
    if network == "unet":
        return key_maps.torch_name(inside)
    site, _, rest = inside.partition("/")
    return key_maps.torch_name(f"{block_of_site(site)}/{rest}")


def of_unet(tree: Tree, source: Source) -> tuple[list[Item], list[str]]:
    """(the parameters that the source has, top-level names of those that begin random). What the UNet of the method reads beside
    the latent is not in the source: its conv_in then begins random too, the whole of it."""
    taken: dict[str, Any] = {}
    for path, leaf in key_maps.leaves(tree):
        if path.split("/", 1)[0] not in OF_UNET or "/motion_modules_" in path:
            continue
        found = source.tensors.infos.get(unet_tensor(path))
        if path.startswith("unet/conv_in/") and found and found.shape != key_maps.torch_shape(path, tuple(leaf.shape)):
            continue
        taken[path] = leaf
    wide = "unet/conv_in/kernel" not in taken
    if wide:
        taken.pop("unet/conv_in/bias")
        left = (r"conv_in\.(weight|bias)", "the method reads more channels: its first convolution begins random")
        source = dataclasses.replace(
            source, keys=dataclasses.replace(source.keys, ignored=(*source.keys.ignored, left))
        )
    items = parameters(key_maps.nest(taken), lambda path: (source, unet_tensor(path)))
    return items, [name for name in tree if name not in OF_UNET] + (["unet/conv_in"] if wide else [])


def fresh_of(fresh: Iterable[str], path: str) -> bool:
    """Whether the parameter at `path` lies in one of the networks (or parts) that begin random."""
    return any(path == name or path.startswith(f"{name}/") for name in fresh)
