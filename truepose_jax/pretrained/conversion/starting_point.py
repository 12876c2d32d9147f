"""TruePose's starting point out of one pretrained UNet (docs/paper.md A24).

SourceNet and TargetNet are both that UNet, and CAA is TargetNet's attn2. HPFA begins as the self-attention of its block:
its projections are attn1's, its norm is norm1, and its output projection is zero, so that the network starts as if HPFA
were not there. The pose encoder has nothing to begin with.
"""

from __future__ import annotations

import re

from truepose_jax.pretrained.conversion import key_maps
from truepose_jax.pretrained.conversion.truepose_names import block_of_site

FRESH = ("pose_encoder",)
"""Networks that stay without weights."""

ZEROS = ""
"""In place of a tensor's name."""

_TARGET_HPFA = re.compile(r"(.+/transformer_blocks_\d+)/hpfa/(to_q|norm|to_out_0)/(\w+)")


def unet_tensor(path: str) -> str:
    """The UNet's tensor that the parameter at `path` begins as, by diffusers' name; ZEROS for zeros.

    Raises ValueError for a path of a network that does not come from a UNet.
    """
    network, _, inside = path.partition("/")
    if network == "source_net":
        return key_maps.torch_name(inside)
    if network == "target_net":
        hpfa = _TARGET_HPFA.fullmatch(inside)
        if not hpfa:
            return key_maps.torch_name(inside)
        block, module, leaf = hpfa.groups()
        if module == "to_out_0":
            return ZEROS
        return key_maps.torch_name(f"{block}/{'attn1/to_q' if module == 'to_q' else 'norm1'}/{leaf}")
    if network == "fusion":
        site, part, projection, leaf = inside.split("/")
        attention = "attn1" if part == "hpfa" else part
        return key_maps.torch_name(f"{block_of_site(site)}/{attention}/{projection.removeprefix('source_')}/{leaf}")
    raise ValueError(f"{path} is no parameter that a UNet has")


def zeros_like(path: str) -> str:
    """The tensor whose dtype the zeros of HPFA's output projection at `path` have: its block's own."""
    block = path.removeprefix("target_net/").rsplit("/hpfa/", 1)[0]
    return key_maps.torch_name(f"{block}/attn1/to_out_0/{path.rsplit('/', 1)[-1]}")
