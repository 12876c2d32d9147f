"""The synthetic benchmark: the paper's ablations B1 to B4, our recipe's and our sweeps, on people at 64x48 on CPU cores.

    python experiments/ablation.py --scratch=runs/ablation         (all of them, with the encoder, the data, the report)
    python -m truepose_jax.train --config=configs/synthetic_ablation.py:B3 --workdir=DIR \
        --config.data.root=PEOPLE --config.model.clip.path=CLIP   (one of them)

Not a row of the paper, but the question of its Table 2 asked at a size that two cores can train. PEOPLE: records of
synthetic people; CLIP: the region encoder of configs/synthetic_clip.py. The network has the paper's modules alone, none of
what is ours in the demo; RESULTS.md has the numbers and what they can and cannot say.
"""

from configs import base
from configs.variants import vary


def get_config(variant: str = "full"):
    config = base.get_config()
    config.total_steps = 1_500
    config.batch_size = 12
    config.log_every = 10

    model = config.model
    model.size = (64, 48)
    model.autoencoder = "pixels"
    model.pixel_factor = 4
    model.unet.in_channels = model.unet.out_channels = 48
    model.unet.block_out_channels = (48, 64)
    model.unet.down_block_types = ("DownBlock2D", "DownBlock2D")
    model.unet.up_block_types = ("UpBlock2D", "CrossAttnUpBlock2D")
    model.unet.layers_per_block = 1
    model.unet.attention_head_dim = (1, 2)
    model.unet.cross_attention_dim = 64
    model.unet.norm_num_groups = 8
    model.fusion.init = "identity"
    model.fusion.out_init = "random"
    model.clip.path = "runs/ablation/clip"
    model.positions = "sincos"
    model.source_parsing = "coverage"
    model.remat = False
    model.dtype = "float32"

    config.diffusion.schedule.betas = "cosine"
    config.diffusion.schedule.prediction = "x0"
    config.diffusion.schedule.clip_x0 = 1.0
    config.diffusion.timestep_power = 0.35
    config.diffusion.drop_rate = 0.1
    config.diffusion.steps = 4
    config.diffusion.spacing = "trailing"
    config.diffusion.guidance = 1.0

    config.data.dataset = "records"
    config.data.root = "runs/ablation/people"
    config.data.labels = ""
    config.data.targets_per_source = 3
    config.data.self_pair = 0.25
    config.data.threads = 1
    config.data.synthetic.identities = 1_000
    config.data.synthetic.patterns = "solid"
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
    config.checkpoint.keep = 1
    config.eval.every = config.total_steps
    config.eval.pairs = 64
    config.eval.batch_size = 32
    config.eval.steps = 4
    config.eval.guidance = 1.0
    return vary(config, variant)
