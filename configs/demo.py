"""The demonstration: TruePose from nothing on synthetic people at 128x96, minutes on two CPU cores.

    make demo            (or: python -m truepose_jax.demo --workdir=runs/demo)

Not a row of the paper. Ours beside it (docs/paper.md 12.1): carried latents, cosine logits, H = F' + H', the half-cell head
with limb coordinates and the source moved limb by limb, the pixel loss. For training from nothing: a linear patch codec as
autoencoder, x0 prediction with more of the noisy timesteps, positions after conv_in, the parsing map into SourceNet, HPFA's
square projections starting as identities, an untrained CLIP, a tenth of the pairs with the source as its own target. HPFA,
CAA (K = 2) and the equations are the paper's.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.total_steps = 6_000  # `make demo` takes fewer, by the clock
    config.batch_size = 12
    config.log_every = 10

    model = config.model
    model.size = (128, 96)
    model.autoencoder = "patches"
    model.unet.in_channels = model.unet.out_channels = 4 * model.patch_channels
    model.unet.block_out_channels = (48, 64)
    model.unet.down_block_types = ("DownBlock2D", "DownBlock2D")
    model.unet.up_block_types = ("UpBlock2D", "CrossAttnUpBlock2D")
    model.unet.layers_per_block = 1
    model.unet.attention_head_dim = (1, 2)
    model.unet.cross_attention_dim = 64
    model.unet.norm_num_groups = 8
    model.fusion.init = "identity"
    model.fusion.out_init = "random"
    model.fusion.carry_latents = model.fusion.cosine = model.fusion.residual = True
    model.carry.head = model.carry.limb_warp = True
    model.positions = "sincos"
    model.source_parsing = "coverage"
    model.remat = False
    model.dtype = "float32"

    config.diffusion.schedule.betas = "cosine"
    config.diffusion.schedule.prediction = "x0"
    config.diffusion.timestep_power = 0.35
    config.diffusion.drop_rate = 0.1
    config.diffusion.steps = 4
    config.diffusion.spacing = "trailing"
    config.diffusion.guidance = 1.0
    config.diffusion.losses.latents = 0.5
    config.diffusion.losses.pixels = 2.0
    config.diffusion.losses.parsing = 0.3

    config.data.targets_per_source = 3
    config.data.self_pair = 0.1
    config.data.threads = 1
    config.data.synthetic.identities = 1_500
    config.data.synthetic.patterns = "mixed"
    config.data.synthetic.background = "plain"
    config.data.synthetic.framing = "close"
    config.data.synthetic.heldout_identities = 32

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.optim.schedule = "cosine"
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.0
    config.optim.ema_decay = 0.998
    config.optim.layout = "flat"

    config.checkpoint.every = 500
    config.checkpoint.keep = 2
    config.eval.every = 1_000
    config.eval.pairs = 32
    config.eval.batch_size = 32
    config.eval.steps = 4
    config.eval.guidance = 1.0
    return config
