"""The paper's ablations (section 5.3), the readings that sweeps compare, and our recipe's switches, as changes of any
configuration: dotted keys under config.

    --config=configs/synthetic_ablation.py:B3      --config=configs/truepose_deepfashion_512.py:B4

B1  CLIP's patches through an MLP in SourceNet's place, then HPFA and CAA as in the full model
B2  AnimateAnyone's fusion: F' beside TargetNet's own tokens in its self-attention; attn2 reads the whole image's token
B3  without CAA: HPFA, and attn2 reads the whole image's token
B4  without HPFA: B2's fusion with CAA, whose scores come from SourceNet's own attention
What is ours (docs/paper.md) stays as the configuration has it, but for what belongs to HPFA, in B2 and B4.

READINGS change one decision that we took by reading (docs/paper.md A1, A5, A17, A23; zero-initialised HPFA output); in A5's
SourceNet H' alone is left, so that there is no F' + H'.
RECIPE takes out one thing that is ours, where two only work together both, and in "paper" all of it.

flow  not the paper's: HPFA's softmax also carries the source's latents, with a loss that what it carries lie near the target's;
      cosine logits; keys and values from H = F' + H'. HPFA's output still starts at zero, so SD1.5's start is untouched
"""

WITHOUT_HPFA = {
    "model.fusion.texture": "concat",
    "model.fusion.carry_latents": False,
    "model.fusion.cosine": False,
    "model.fusion.residual": False,
}
WITHOUT_HEAD = {"model.carry.head": False, "model.carry.limb_warp": False, "diffusion.losses.parsing": 0.0}
WITHOUT_CAA = {"model.fusion.alignment": "global"}
ABLATIONS = {
    "full": {},
    "B1": {"model.fusion.features": "clip"},
    "B2": WITHOUT_HPFA | WITHOUT_CAA,
    "B3": WITHOUT_CAA,
    "B4": WITHOUT_HPFA,
}
READINGS = {
    "A1_query": {"model.fusion.mask_axis": "query"},
    "A1_outer": {"model.fusion.mask_axis": "outer"},
    "A1_none": {"model.fusion.mask_axis": "none"},
    "A5_inplace": {"model.fusion.source_attention": "inplace", "model.fusion.residual": False},
    "A17_reweighted": {"model.fusion.score": "reweighted"},
    "A17_softmax": {"model.fusion.score": "softmax"},
    "A23_prose": {"model.fusion.reading": "prose"},
    "zero_init": {"model.fusion.out_init": "zeros"},
}
RECIPE = {
    "no_latents": {"model.fusion.carry_latents": False},
    "no_residual": {"model.fusion.residual": False},
    "no_flow": {"diffusion.losses.flow": 0.0},
    "no_pixels": {"diffusion.losses.pixels": 0.0},
    "no_head": WITHOUT_HEAD,
    "no_cosine": WITHOUT_HEAD | {"model.fusion.cosine": False},  # whose limb coordinates need cosines
    "paper": WITHOUT_HEAD
    | {f"model.fusion.{name}": False for name in ("carry_latents", "cosine", "residual")}
    | {"diffusion.losses.latents": 1.0, "diffusion.losses.flow": 0.0, "diffusion.losses.pixels": 0.0},
}
FLOW = {f"model.fusion.{name}": True for name in ("carry_latents", "cosine", "residual")} | {
    "diffusion.losses.flow": 0.3
}
VARIANTS = ABLATIONS | READINGS | RECIPE | {"flow": FLOW}


def vary(config, name: str):
    """`config` as the named variant. Raises KeyError with the known names."""
    if name not in VARIANTS:
        raise KeyError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    config.update_from_flattened_dict(VARIANTS[name])
    return config
