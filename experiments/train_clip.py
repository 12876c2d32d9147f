"""Trains a region encoder for synthetic people: python -m experiments.train_clip --config=FILE --out=FOLDER.

Run the same command again to go on where it stopped. It is a transformers CLIP vision folder, for config.model.clip.path.
See experiments/contrastive.py and configs/synthetic_clip.py.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.contrastive import ClipTraining, Stopped, train, write
from truepose_jax.config import ConfigError, from_config_dict
from truepose_jax.runtime.cli import run_with_config
from truepose_jax.runtime.files import make_folder
from truepose_jax.training.checkpoint import STOPPED, lock_workdir


def main(argv: list[str], config: ConfigDict | None, out: str | None) -> int:
    """config, out: what --config and --out say."""
    if len(argv) > 1:
        raise ConfigError(f"unknown argument {argv[1]!r}; settings are --config.key=value")
    for name, value in (("config", config), ("out", out)):
        if not value:
            raise ConfigError(f"--{name} is missing: python -m experiments.train_clip --config=FILE --out=FOLDER")
    settings = from_config_dict(ClipTraining, config)
    folder = pathlib.Path(out)
    if folder.exists():
        raise ConfigError(f"--out={folder} exists; name a folder that does not")
    make_folder(folder.parent)
    workdir = folder.with_name(f".{folder.name}.training")
    with lock_workdir(workdir):
        try:
            vision, params, results = train(settings, workdir)
        except Stopped as stopped:
            print(f"asked to stop: saved step {stopped}; run the same command again to go on", flush=True)
            return STOPPED
        write(folder, vision, params, {"config": dataclasses.asdict(settings), "results": results})
        shutil.rmtree(workdir, ignore_errors=True)
    print(
        f"wrote {folder}: of {settings.synthetic.heldout_identities} held-out people, crops of clothes are known again in "
        f"another pose {_said('clothes', results)}, of all regions {_said('all', results)}"
    )
    return 0


def _said(name: str, results: dict) -> str:
    before, after = results["untrained"], results["trained"]
    return (
        f"{after[name]:.0%} of the time ({before[name]:.0%} before training, {after[f'{name}_chance']:.0%} by chance)"
    )


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "configs/synthetic_clip.py", lock_config=True)
    OUT = flags.DEFINE_string("out", None, "The folder to write; it must not exist.")
    run_with_config(lambda argv: main(argv, CONFIG.value, OUT.value))
