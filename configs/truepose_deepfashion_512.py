"""TruePose, Table 1, DeepFashion 512x352 (LPIPS .180, SSIM .744, PSNR 17.627, FID 7.05).

    python -m truepose_jax.train --config=configs/truepose_deepfashion_512.py --workdir=DIR \
        --config.data.root=DEEPFASHION --config.data.pairs=PAIRS.csv \
        --config.model.vae=SD15 --config.model.clip.path=CLIP

Paper's hardware: 4 A800, batch 12, 50 epochs of 101,966 pairs (425,000 steps), AdamW at a constant 1e-5, 30 % dropped,
K = 2, DDIM 35 steps at guidance 3.5. Ours where the paper is silent: EMA 0.9999, clipping at 1, flips.

DEEPFASHION holds `image/` and `parsing/` (SCHP, ATR-18) and, as `keypoints`, the annotation CSV; PAIRS.csv has columns
from,to. SD15 is a diffusers folder with `vae/`; CLIP a transformers ViT-L/14 folder. The networks start from random
weights: starting from SD1.5's, as the paper does, needs the weight converter, which is not there yet. Not run by us.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.total_steps = 425_000
    config.batch_size = 12
    config.log_every = 10
    config.data.dataset = "folder"
    config.data.root = "data/deepfashion"
    config.data.labels = "atr18"
    config.data.keypoints = "data/deepfashion/fasion-resize-annotation-train.csv"
    config.data.pairs = "data/deepfashion/fasion-resize-pairs-train.csv"
    config.data.flip = True
    config.optim.ema_decay = 0.9999
    return config
