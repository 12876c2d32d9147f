"""FPDM on drawn people at 64x48, from nothing, on CPU cores: `:ipf`, its first stage; `:fpdm`; `:stage2_only`, without the first.

    python experiments/methods.py --scratch=runs/methods        (the stages one after the other, and what they reach)

Not a row of the paper. The demo's recipe where it helps any method: x0 prediction, more of the noisy timesteps, positions, a
tenth of the pairs with the source as its own target. DINOv2 is a seeded stand-in of two layers, untrained. Results: RESULTS.md.
"""

from configs import base

VARIANTS = ("ipf", "fpdm", "stage2_only")
SMALL_CLIP = {
    "hidden_size": 96, "intermediate_size": 384, "projection_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def get_config(variant: str = "fpdm"):
    if variant not in VARIANTS:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if variant == "ipf":
        return first_stage()
    config = base.get_config("fpdm")
    on_cpu_cores(config)
    config.total_steps = 6_000
    config.model.size = (64, 48)
    config.model.dino.update(image_size=64, patch_size=8, hidden_size=96, heads=3)
    config.model.ipf.update(image_size=32)
    config.model.fusion_embedding = variant == "fpdm"
    config.model.projection = 96
    config.data.targets_per_source = 3
    config.data.self_pair = 0.1
    config.diffusion.drop_rate = 0.1
    return config


def first_stage():
    config = base.get_config("ipf")
    drawn(config)
    config.total_steps = 2_000
    config.batch_size = 64
    config.model.size = (64, 48)
    config.model.dtype = "float32"
    config.model.remat = False
    config.model.clip.update(SMALL_CLIP)
    config.model.dropout = 0.1
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.optim.schedule = "cosine"
    config.eval.update(every=500, pairs=64, batch_size=64)
    return config


def drawn(config) -> None:
    """The people, as the demo's."""
    config.log_every = 10
    config.data.threads = 1
    config.data.synthetic.update(
        identities=1_500, patterns="mixed", background="plain", framing="close", heldout_identities=64
    )
    config.checkpoint.update(every=100, keep=2)


def on_cpu_cores(config) -> None:
    """A small network that learns from nothing: pixels as latents, two levels of cells, the recipe of the demo."""
    drawn(config)
    config.total_steps = 3_000
    config.batch_size = 12
    model = config.model
    model.autoencoder = "pixels"
    model.pixel_factor = 4
    model.unet.in_channels = model.unet.out_channels = 48
    model.unet.block_out_channels = (48, 64)
    model.unet.down_block_types = ("DownBlock2D", "CrossAttnDownBlock2D")
    model.unet.up_block_types = ("CrossAttnUpBlock2D", "UpBlock2D")
    model.unet.layers_per_block = 1
    model.unet.attention_head_dim = (2, 2)
    model.unet.cross_attention_dim = 64
    model.unet.norm_num_groups = 8
    model.positions = "sincos"
    model.pose_encoder = "four_conv"
    model.remat = False
    model.dtype = "float32"

    config.diffusion.schedule.betas = "cosine"
    config.diffusion.schedule.prediction = "x0"
    config.diffusion.schedule.clip_x0 = 1.0
    config.diffusion.timestep_power = 0.35
    config.diffusion.spacing = "trailing"
    config.diffusion.steps = config.eval.steps = 4
    config.diffusion.guidance = config.eval.guidance = 1.0

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.optim.schedule = "cosine"
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.0
    config.optim.ema_decay = 0.99
    config.optim.layout = "flat"
    config.eval.update(every=1_000, pairs=32, batch_size=32)
