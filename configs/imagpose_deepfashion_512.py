"""IMAGPose on DeepFashion, its three stages (the public code's numbers): `:stage1`, `:stage2`, `:stage3`; `:B0` to `:B4`, the
paper's ablations, are stage 1 with parts left out.

    python -m truepose_jax.train --config=configs/imagpose_deepfashion_512.py:stage1 --workdir=DIR \
        --config.data.root=DEEPFASHION --config.init_from=SD15 --config.model.dino.path=DINOV2_BASE --config.model.vae=VAE
    ... :stage2 --config.init_from=STAGE1 and :stage3 --config.init_from=STAGE2, each of the run before

stage  trained    rate, steps, canvases a step   tile (h x w)
1      all but CVA, which is not there   5e-5, 50,000, 16   512x512
2      CVA                               5e-5, 200,000, 32  768x512
3      all                               1e-6, 50,000, 8    512x512

AdamW, decay 0.01, v prediction with zero terminal SNR, trailing steps, noise offset 0.05, min-SNR 5, 20 steps at guidance 2 (the
paper; the code: 30). Theirs: 8 V100. SD15: what `convert from-torch --for=imagpose` made of Stable Diffusion 1.5. Tiles of
512x352 do not cut in two at every level: 512x512 or 512x384 are made and resized. Not run by us.

B0  without CVA, texture and the given tiles' latents (5 channels)   B1  B0 with CVA   B2  B1 with texture
B3  B1 with the given tiles' latents                                 B4  all but CVA
"""

from configs import base

STAGES = {"stage1": (50_000, 16, 5e-5), "stage2": (200_000, 32, 5e-5), "stage3": (50_000, 8, 1e-6)}
ABLATIONS = {
    "B0": {"cva": False, "texture": False, "ilc_image": False},
    "B1": {"cva": True, "texture": False, "ilc_image": False},
    "B2": {"cva": True, "texture": True, "ilc_image": False},
    "B3": {"cva": True, "texture": False, "ilc_image": True},
    "B4": {"cva": False, "texture": True, "ilc_image": True},
}


def get_config(variant: str = "stage3"):
    if variant not in {**STAGES, **ABLATIONS}:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join({**STAGES, **ABLATIONS})}")
    config = base.get_config("imagpose")
    config.total_steps, config.batch_size, config.optim.learning_rate = STAGES.get(variant, STAGES["stage1"])
    config.log_every = 10
    if variant == "stage1":
        config.model.cva = False
    if variant == "stage2":
        config.model.size = (768, 512)
        config.optim.trainable = r"/motion_modules_\d+/"
    config.model.update(ABLATIONS.get(variant, {}))
    if not config.model.ilc_image:
        config.model.unet.in_channels = 5
    recipe(config)
    config.model.skeleton = "openpose"
    config.model.dino.update(patch_size=14, hidden_size=768, layers=12, heads=12)  # for plans without the folder
    config.data.dataset = "records"
    config.data.root = "data/deepfashion"
    config.data.labels = ""
    config.data.flip = True
    return config


def recipe(config) -> None:
    """What all stages share."""
    config.diffusion.schedule.prediction = "v"
    config.diffusion.schedule.zero_snr = True
    config.diffusion.spacing = "trailing"
    config.diffusion.noise_offset = 0.05
    config.diffusion.min_snr = 5.0
    config.diffusion.drop_rate = 0.05
    config.diffusion.steps = 20
    config.diffusion.guidance = 2.0
    config.eval.steps = 20
    config.eval.guidance = 2.0
