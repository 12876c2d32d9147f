"""IMAGPose on drawn people, tiles of 64x48, from nothing, on CPU cores; `:full` and `:B0` to `:B4`, the paper's ablations.

    python experiments/methods.py --scratch=runs/methods        (trains it and judges its scenarios)

Not a row of the paper. The ablations leave out what imagpose_deepfashion_512.py says, at equal terms, 900 steps each. The recipe
of synthetic_fpdm.py; one training stage in the place of three, CVA in it from the start. The reference's texture comes in patches
of 4 cells. DINOv2 is a seeded stand-in of two layers, untrained. Results: RESULTS.md.
"""

from configs import base
from configs.imagpose_deepfashion_512 import ABLATIONS
from configs.synthetic_fpdm import on_cpu_cores

VARIANTS = ("imagpose", "full", *ABLATIONS)


def get_config(variant: str = "imagpose"):
    if variant not in VARIANTS:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = base.get_config("imagpose")
    on_cpu_cores(config)
    config.model.size = (64, 48)
    config.data.synthetic.patterns = "two_sided"  # what no front tells, so that a second source is worth something
    config.model.dino.update(image_size=64, patch_size=8, hidden_size=96, heads=3)
    config.model.patch = 4
    config.model.cva = True
    config.model.update(ABLATIONS.get(variant, {}))
    config.model.unet.in_channels = 97 if config.model.ilc_image else 49
    config.batch_size = 3
    config.total_steps = 12_000
    if variant != "imagpose":
        config.total_steps = config.eval.every = 900
    config.eval.pairs = config.eval.batch_size = 16
    config.diffusion.drop_rate = 0.05
    return config
