"""Trains a region encoder for synthetic people: python -m truepose_jax.train_clip --config=FILE --out=FOLDER.

The folder is a transformers CLIP vision folder, for config.model.clip.path. See contrastive.py and configs/synthetic_clip.py.
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import flags
from ml_collections import config_flags

from truepose_jax.contrastive import ClipTraining, train, write
from truepose_jax.programs import run_with_config
from truepose_jax.schema import ConfigError, from_config_dict

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/synthetic_clip.py", lock_config=True)
OUT = flags.DEFINE_string("out", None, "The folder to write; it must not exist.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    for name, value in (("config", CONFIG.value), ("out", OUT.value)):
        if not value:
            raise ConfigError(f"--{name} is missing: python -m truepose_jax.train_clip --config=FILE --out=FOLDER")
    config = from_config_dict(ClipTraining, CONFIG.value)
    folder = pathlib.Path(OUT.value)
    if folder.exists():
        raise ConfigError(f"--out={folder} exists; name a folder that does not")
    vision, params, results = train(config)
    write(folder, vision, params, {"config": dataclasses.asdict(config), "results": results})
    print(
        f"wrote {folder}: a held-out garment is known again in another pose among {config.synthetic.heldout_identities} "
        f"people {results['trained']:.0%} of the time ({results['untrained']:.0%} before training)"
    )
    return 0


if __name__ == "__main__":
    run_with_config(main)
