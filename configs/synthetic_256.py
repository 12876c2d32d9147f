"""Synthetic people at 256x176 on one GPU, from nothing: no pretrained weights, pixels as latents.

    python -m truepose_jax.train --config=configs/synthetic_256.py --workdir=runs/synthetic_256

Hardware: one GPU with 40 GB or more. Not a row of the paper: the network is narrower than SD1.5 (its width is 4 times
the 48 latent channels), predicts x0, and its region tokens come from an untrained CLIP. The paper's K, sigma, delta and
drop rate are kept. Expected result: not measured yet. The first start renders 16,384 pictures for their tokens (minutes).
"""

from configs import base


def get_config():
    config = base.get_config()
    config.total_steps = 50_000
    config.log_every = 10

    model = config.model
    model.size = (256, 176)
    model.autoencoder = "pixels"
    model.pixel_factor = 4
    model.unet.in_channels = model.unet.out_channels = 48
    model.unet.block_out_channels = (192, 384, 576)
    model.unet.down_block_types = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2
    model.unet.up_block_types = ("CrossAttnUpBlock2D",) * 3
    model.unet.attention_head_dim = (4, 8, 12)
    model.fusion.init = "identity"
    model.fusion.out_init = "random"

    config.diffusion.schedule.betas = "cosine"
    config.diffusion.schedule.prediction = "x0"
    config.diffusion.schedule.clip_x0 = 1.0
    config.diffusion.timestep_power = 0.5
    config.diffusion.spacing = "trailing"
    config.diffusion.guidance = 1.5
    config.eval.guidance = 1.5

    config.data.targets_per_source = 3
    config.data.self_pair = 0.1
    config.batch_size = 96

    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 1_000
    config.optim.schedule = "cosine"
    config.optim.b2 = 0.99
    config.optim.ema_decay = 0.9995
    return config
