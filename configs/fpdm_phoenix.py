"""FPDM on RWTH-PHOENIX-2014T, sign language, at 256x256: poses of 133 points, SD2.1-base; `:ipf` is its first stage.

    python -m truepose_jax.prepare build --dataset=phoenix --raw=RAW --out=PHOENIX
    python -m truepose_jax.train --config=configs/fpdm_phoenix.py:ipf --workdir=DIR --config.data.root=PHOENIX \
        --config.init_from=CLIP
    python -m truepose_jax.train --config=configs/fpdm_phoenix.py --workdir=DIR --config.data.root=PHOENIX \
        --config.init_from=SD21 --config.model.dino.path=DINOV2_LARGE --config.model.ipf.path=IPF --config.model.vae=VAE

The folders are those of fpdm_deepfashion_512.py and ipf_deepfashion.py, whose settings stay where nothing is said. Of the public
code's configurations for it: first stage, batch 48, 3 epochs at 1e-6; second, batch 128 (64 x 2), at most 1e-4, decay 0.01,
noise offset 0.1, pose dropped in a tenth; there the source went through CLIP, here through DINOv2 as in the paper's last version.
Ours: 100 epochs of 781 batches, one rate of dropping. Published: SSIM 86.4 (a listing). Not run by us: nobody here has the data.
"""

from configs import fpdm_deepfashion_512, ipf_deepfashion

VARIANTS = ("fpdm", "ipf")


def get_config(variant: str = "fpdm"):
    if variant not in VARIANTS:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = ipf_deepfashion.get_config() if variant == "ipf" else fpdm_deepfashion_512.get_config()
    config.data.root = "data/phoenix"
    config.model.size = (256, 256)
    config.model.skeleton = "wholebody133"
    if variant == "ipf":
        config.total_steps = 6_250
        config.optim.learning_rate = 1e-6
        return config
    config.total_steps = 78_100
    config.batch_size = 128
    config.diffusion.schedule.prediction = "eps"
    config.diffusion.drop_rate = 0.1
    config.data.flip = False  # signs have sides
    config.data.self_pair = 0.0
    config.optim.accumulation = 2
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 3_905
    return config
