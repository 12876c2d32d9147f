"""The synthetic benchmark: the paper's ablations B1 to B4, our recipe's and our sweeps, on people at 64x48 on CPU cores.

    python experiments/ablation.py --scratch=runs/ablation         (all of them, with the encoder, the data, the report)
    python -m truepose_jax.train --config=configs/synthetic_ablation.py:B3 --workdir=DIR \
        --config.data.root=PEOPLE --config.model.clip.path=CLIP   (one of them)

Not a row of the paper, but the question of its Table 2 asked at a size that a CPU core trains in minutes. PEOPLE: records
of synthetic people; CLIP: the region encoder of configs/synthetic_clip.py. The network and the recipe are the demo's, at
half its size (8x6 cells, 16x12 half cells); RESULTS.md has the numbers and what they can and cannot say.
"""

from configs import demo
from configs.variants import vary


def get_config(variant: str = "full"):
    config = demo.get_config()
    config.total_steps = 600
    config.model.size = (64, 48)
    config.model.carry.limb_warp = False  # it would place most pixels whatever the variant
    config.diffusion.losses.flow = 0.3
    config.data.dataset = "records"
    config.data.root = "runs/ablation/people"
    config.data.labels = ""
    config.model.clip.path = "runs/ablation/clip"
    config.eval.every = 0  # experiments/ablation.py judges the last step
    config.checkpoint.every = 200
    config.checkpoint.keep = 1
    return vary(config, variant)
