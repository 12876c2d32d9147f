"""A region encoder for synthetic people, trained to know a garment again in another pose; minutes on two CPU cores.

    python -m experiments.train_clip --config=configs/synthetic_clip.py --out=runs/synthetic_clip

Not a row of the paper: its CLIP is OpenAI's. An untrained one cannot test what rests on CLIP (CAA, and ablation B1), so
the synthetic benchmark (configs/synthetic_ablation.py) trains this one first, on people of its own, and freezes it. The
folder is a transformers CLIP vision folder: config.model.clip.path takes it.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 7,
            "total_steps": 600,
            "identities_per_step": 32,
            "checkpoint_every": 100,
            "learning_rate": 1e-3,
            "temperature": 0.07,
            "size": (64, 48),
            "width": 64,
            "clip": base.get_config().model.clip.to_dict(),
            "synthetic": {
                "identities": 1_000,
                "poses_per_identity": 4,
                "patterns": "solid",
                "background": "plain",
                "framing": "close",
                "poses": "",
                "heldout_identities": 64,
                "heldout_poses_per_identity": 2,
            },
        }
    )
