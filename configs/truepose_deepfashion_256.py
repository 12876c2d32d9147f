"""TruePose, Table 1, DeepFashion 256x176 (LPIPS .151, SSIM .727, PSNR 18.123, FID 7.265).

    python -m truepose_jax.train --config=configs/truepose_deepfashion_256.py --workdir=DIR ...

As truepose_deepfashion_512.py (see there for the folders), with the paper's batch of 60: 85,000 steps.
"""

from configs import truepose_deepfashion_512


def get_config(variant: str = "full"):
    config = truepose_deepfashion_512.get_config(variant)
    config.total_steps = 85_000
    config.batch_size = 60
    config.model.size = (256, 176)
    return config
