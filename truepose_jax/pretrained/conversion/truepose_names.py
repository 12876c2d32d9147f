"""Where each parameter of TruePose lies in an export to PyTorch, and under which name: the only place that knows.

An export is a folder of two whole UNet2DConditionModels (their names are diffusers'), and a third file with what no
diffusers class has:

    source_net/   SourceNet
    target_net/   TargetNet without HPFA; its attn2 is CAA, whose keys and values are our fusion's
    truepose.safetensors
        hpfa.down_blocks.0.attentions.0.transformer_blocks.0.{source_to_q,source_to_k,source_to_v,to_k,to_v,to_q}.weight
        hpfa. ... .norm.{weight,bias}, hpfa. ... .to_out.0.{weight,bias}
        hpfa. ... .cosine_scale                    (only with model.fusion.cosine)
        pose_encoder.conv_{0,1,2}.{weight,bias}, pose_encoder.conv_out.{weight,bias}
        parsing_encoder.class_bias.weight          (only with model.source_parsing "coverage")
        limb_encoder. ..., carry_source. ..., carry_target. ..., hpfa. ... .limbs.weight and .limb_scale
                                                   (only with model.carry.head)
        clip_source. ...                           (ablation B1, in SourceNet's place)

Arrays are laid out as PyTorch has them: key_maps.torch_layout(path, array) and its inverse.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from truepose_jax.pretrained.conversion import key_maps

SOURCE_NET = "source_net"
TARGET_NET = "target_net"
EXTRAS = "truepose"
"""Stems of the three groups of tensors: two folders and truepose.safetensors."""

STEMS = (SOURCE_NET, TARGET_NET, EXTRAS)
SETTINGS_FILE = "truepose.json"

_BLOCK = r"(?:(?:down|up)_blocks_\d+|mid_block)/attentions_\d+/transformer_blocks_\d+"
_BLOCK_OF_SITE = re.compile(r"((?:down|up)_blocks_\d+|mid_block)_(attentions_\d+)_(transformer_blocks_\d+)")
_HPFA_OF_SOURCE = ("source_to_q", "source_to_k", "source_to_v", "to_k", "to_v", "limbs")
"""HPFA's projections on the source side, which our fusion holds; the others are TargetNet's."""

_NORM = re.compile(r"(?:alpha_|out_)?norm\d*|conv_norm_out")
"""Modules whose `weight` is a scale and no kernel."""


HEAD = ("limb_encoder", "carry_source", "carry_target")
"""Networks of the half-cell head."""

_BESIDE = ("pose_encoder", "parsing_encoder", "clip_source", *HEAD)
"""Networks that lie whole in truepose.safetensors, under their own names."""


class Place(NamedTuple):
    """stem: one of STEMS. tensor: the name within that file."""

    stem: str
    tensor: str


def place_of(path: str) -> Place:
    """Where the parameter at `path` ('fusion/<site>/hpfa/to_k/kernel') lies in an export.

    Raises ValueError for a path that TruePose has not.
    """
    network, _, inside = path.partition("/")
    if network == "source_net":
        return Place(SOURCE_NET, key_maps.torch_name(inside))
    if network == "target_net":
        hpfa = re.fullmatch(rf"({_BLOCK})/hpfa/(.+)", inside)
        if hpfa:
            return Place(EXTRAS, key_maps.torch_name(f"hpfa/{hpfa[1]}/{hpfa[2]}"))
        return Place(TARGET_NET, key_maps.torch_name(inside))
    if network == "fusion":
        site, _, rest = inside.partition("/")
        block = block_of_site(site)
        if rest.startswith("hpfa/"):
            return Place(EXTRAS, key_maps.torch_name(f"hpfa/{block}/{rest.removeprefix('hpfa/')}"))
        return Place(TARGET_NET, key_maps.torch_name(f"{block}/{rest}"))
    if network in _BESIDE:
        return Place(EXTRAS, key_maps.torch_name(path))
    raise ValueError(f"{path} is no parameter of TruePose")


def path_of(place: Place) -> str:
    """The inverse of `place_of`. Raises ValueError for a tensor that an export of TruePose has not."""
    path = _our_path(place.tensor)
    if place.stem == SOURCE_NET:
        return f"source_net/{path}"
    if place.stem == TARGET_NET:
        caa = re.fullmatch(rf"({_BLOCK})/(attn2/to_[kv]/.+)", path)
        return f"fusion/{site_of_block(caa[1])}/{caa[2]}" if caa else f"target_net/{path}"
    hpfa = re.fullmatch(rf"hpfa/({_BLOCK})/(([^/]+)(?:/.+)?)", path)
    if place.stem == EXTRAS and hpfa:
        of_source = hpfa[3] in _HPFA_OF_SOURCE
        return (
            f"fusion/{site_of_block(hpfa[1])}/hpfa/{hpfa[2]}" if of_source else f"target_net/{hpfa[1]}/hpfa/{hpfa[2]}"
        )
    if place.stem == EXTRAS and path.split("/")[0] in _BESIDE:
        return path
    raise ValueError(f"an export of TruePose has no tensor {place.tensor} in {place.stem}")


def block_of_site(site: str) -> str:
    """'mid_block_attentions_0_transformer_blocks_0' -> 'mid_block/attentions_0/transformer_blocks_0'."""
    found = _BLOCK_OF_SITE.fullmatch(site)
    if not found:
        raise ValueError(f"{site} is no site of a UNet")
    return "/".join(found.groups())


def site_of_block(block: str) -> str:
    """The inverse of `block_of_site`."""
    return block.replace("/", "_")


def _our_path(tensor: str) -> str:
    """'down_blocks.0.norm1.weight' -> 'down_blocks_0/norm1/scale'; the inverse of key_maps.torch_name here."""
    *modules, leaf = re.sub(r"\.(\d+)(?=\.)", r"_\1", tensor).split(".")
    if leaf == "weight":
        leaf = "scale" if modules and _NORM.fullmatch(modules[-1]) else "kernel"
    return "/".join([*modules, leaf])
