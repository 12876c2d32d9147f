"""FPDM's first stage on DeepFashion: CLIP ViT-L/14 and the combiner, trained by the SPF loss (FPDM's public code).

    python -m truepose_jax.train --config=configs/ipf_deepfashion.py --workdir=DIR \
        --config.data.root=DEEPFASHION --config.init_from=CLIP

Their hardware is not stated; batch 48, 5 epochs of 101,966 pairs (10,620 steps), AdamW at a constant 1e-5, decay 1e-4. CLIP: a
transformers folder of openai/clip-vit-large-patch14. All three pictures are squashed to CLIP's square; the
public code crops the photos' middles here and squashes them in the second stage. Not run by us.
"""

from configs import base


def get_config():
    config = base.get_config("ipf")
    config.total_steps = 10_620
    config.batch_size = 48
    config.log_every = 10
    config.model.skeleton = "pidm"
    config.data.dataset = "records"
    config.data.root = "data/deepfashion"
    config.data.labels = ""
    config.optim.weight_decay = 1e-4
    config.eval.every = 0
    return config
