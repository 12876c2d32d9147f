"""IMAGPose on drawn people, tiles of 64x48, from nothing, on CPU cores; `:no_cva` without the attention among the tiles.

    python experiments/methods.py --scratch=runs/methods        (trains it and judges its scenarios)

Not a row of the paper. The recipe of synthetic_fpdm.py; one training stage in the place of three, CVA in it from the start. The
reference's texture comes in patches of 4 cells. DINOv2 is a seeded stand-in of two layers, untrained. Results: RESULTS.md.
"""

from configs import base
from configs.synthetic_fpdm import on_cpu_cores


def get_config(variant: str = "full"):
    if variant not in ("full", "no_cva"):
        raise KeyError(f"unknown variant {variant!r}; known: full, no_cva")
    config = base.get_config("imagpose")
    on_cpu_cores(config)
    config.model.size = (64, 48)
    config.data.synthetic.patterns = "two_sided"  # what no front tells, so that a second source is worth something
    config.model.unet.in_channels = 97
    config.model.dino.update(image_size=64, patch_size=8, hidden_size=96, heads=3)
    config.model.patch = 4
    config.model.cva = variant == "full"
    config.batch_size = 3
    config.eval.pairs = config.eval.batch_size = 16
    config.diffusion.drop_rate = 0.05
    return config
