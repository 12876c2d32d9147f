"""FPDM on DeepFashion 512x352: the second stage, SD2.1 with DINOv2-L's tokens and the first stage's embedding.

    python -m truepose_jax.train --config=configs/fpdm_deepfashion_512.py --workdir=DIR --config.data.root=DEEPFASHION \
        --config.init_from=SD21 --config.model.dino.path=DINOV2_LARGE --config.model.ipf.path=IPF --config.model.vae=VAE

`:sd15` starts from Stable Diffusion 1.5 in its place; `:stage2_only` leaves the first stage's embedding out (the abstract's
"model using only the second stage"). SD21, SD15: what `convert from-torch --for=fpdm` made of a folder of diffusers; IPF:
what `convert to-torch` wrote of a run of configs/ipf_deepfashion.py.

Of the public code: batch 126 (42 x 3), 100 epochs of 101,966 pairs (80,900 steps), AdamW at 1e-4 without decay, 5 epochs of
warm-up, a tenth from epoch 55 on, noise offset 0.1, each condition dropped in a fifth of the rows, 20 steps at guidance 2. Ours
where it is silent: EMA 0.9999, clipping at 1. Published: FID 7.318 at 256x176 (a listing; no table of the paper could be had).
Not run by us.
"""

from configs import base

SD21 = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VARIANTS = {
    "sd21": {},
    "sd15": {"attention_head_dim": (8,) * 4, "cross_attention_dim": 768, "use_linear_projection": False},
    "stage2_only": {},
}


def get_config(variant: str = "sd21"):
    if variant not in VARIANTS:
        raise KeyError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = base.get_config("fpdm")
    config.total_steps = 80_900
    config.batch_size = 126
    config.log_every = 10
    config.model.unet.update(SD21)
    config.model.unet.update(VARIANTS[variant])
    config.model.skeleton = "pidm"
    config.model.fusion_embedding = variant != "stage2_only"
    large = {"patch_size": 14, "hidden_size": 1024, "layers": 24, "heads": 16}  # for plans without the folders
    config.model.dino.update(image_size=512, **large)
    config.model.ipf.update(image_size=224, width=768, **large)

    config.diffusion.schedule.prediction = "eps" if variant == "sd15" else "v"
    config.diffusion.drop_rate = 0.2
    config.diffusion.noise_offset = 0.1
    config.diffusion.sampler = "ddpm"
    config.diffusion.steps = 20
    config.diffusion.guidance = 2.0
    config.eval.sampler = "ddpm"
    config.eval.steps = 20
    config.eval.guidance = 2.0

    config.data.dataset = "records"
    config.data.root = "data/deepfashion"
    config.data.labels = ""
    config.data.flip = True
    config.data.self_pair = 0.05
    config.optim.learning_rate = 1e-4
    config.optim.weight_decay = 0.0
    config.optim.warmup_steps = 4_045
    config.optim.schedule = "step"
    config.optim.flat = 0.55
    config.optim.final = 0.1
    config.optim.accumulation = 3
    config.optim.ema_decay = 0.9999
    return config
