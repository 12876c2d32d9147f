"""The synthetic benchmark: the paper's ablations B1 to B4 and our sweeps, on synthetic people at 64x48 on CPU cores.

    python benchmarks/ablation.py --scratch=runs/ablation         (all of them, with the encoder, the data, the report)
    python -m truepose_jax.train --config=configs/synthetic_ablation.py:B3 --workdir=DIR \
        --config.data.root=PEOPLE --config.model.clip.path=CLIP   (one of them)

Not a row of the paper, but the question of its Table 2 asked at a size that two cores can train. PEOPLE: records of
synthetic people; CLIP: the region encoder of configs/synthetic_clip.py. The network is the demo's; RESULTS.md has the
numbers and what they can and cannot say.
"""

from configs import demo
from configs.variants import vary


def get_config(variant: str = "full"):
    config = demo.get_config()
    config.total_steps = 1_500
    config.data.dataset = "records"
    config.data.root = "runs/ablation/people"
    config.data.labels = ""
    config.model.clip.path = "runs/ablation/clip"
    config.eval.every = config.total_steps
    config.eval.pairs = 64
    config.checkpoint.every = 500
    config.checkpoint.keep = 1
    return vary(config, variant)
