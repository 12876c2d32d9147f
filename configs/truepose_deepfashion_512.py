"""TruePose, Table 1, DeepFashion 512x352 (LPIPS .180, SSIM .744, PSNR 17.627, FID 7.05); `:B1` to `:B4`: Table 2.
`:flow` is no row of the paper: latents carried by HPFA's softmax, with their loss (configs/variants.py).

    python -m truepose_jax.train --config=configs/truepose_deepfashion_512.py --workdir=DIR \
        --config.data.root=DEEPFASHION --config.init_from=WEIGHTS

Paper's hardware: 4 A800, batch 12, 50 epochs of 101,966 pairs (425,000 steps), AdamW at a constant 1e-5, 30 % dropped,
K = 2, DDIM 35 steps at guidance 3.5; B2 for 10 epochs (section 5.3). Ours where the paper is silent: EMA 0.9999,
clipping at 1, flips.

DEEPFASHION: what `prepare build --dataset=deepfashion` and `prepare annotate` wrote (docs/data.md); WEIGHTS: what `convert
from-torch` made of SD1.5 and CLIP ViT-L/14. experiments/paper_rows.py has every step to the table's row as one command. Not
run by us: neither the photos nor the weights were at hand.
"""

from configs import base
from configs.variants import vary


def get_config(variant: str = "full"):
    config = base.get_config()
    config.total_steps = 425_000
    config.batch_size = 12
    config.log_every = 10
    config.data.dataset = "records"
    config.data.root = "data/deepfashion"
    config.data.labels = ""
    config.data.flip = True
    config.optim.ema_decay = 0.9999
    if variant == "B2":
        config.total_steps = 85_000
    return vary(config, variant)
