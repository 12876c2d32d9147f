"""What comes along with the package, by name: experiments and trained models, in a clone and in an installed wheel."""

from __future__ import annotations

import os
import pathlib

from input_pipeline.schema import InputError
from truepose_jax import BUNDLED

ROOT = BUNDLED if BUNDLED.is_dir() else BUNDLED.parents[1]
CONFIGS, MODELS = ROOT / "configs", ROOT / "docs" / "models"
SHIPPED = MODELS / "synthetic_128x96"
"""The small model of drawn people that is there to be tried."""
NO_EXPERIMENTS = ("__init__", "variants")


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in NO_EXPERIMENTS)


def model_names() -> list[str]:
    return sorted(path.parent.name for path in MODELS.glob("*/truepose.json"))


def find_config(text: str) -> str:
    """The value of --config, FILE or FILE:VARIANT, with the file's path: what is no file here may be the bare name (demo) or
    the path in a clone (configs/demo.py) of one that comes along. Raises InputError."""
    given, colon, variant = text.partition(":")
    if not given:
        raise InputError("--config is empty: name an experiment, such as --config=demo")
    path = pathlib.Path(given)
    if not path.is_file():
        if path.parts[:-1] in ((), ("configs",)) and path.suffix in ("", ".py") and path.stem in config_names():
            path = CONFIGS / f"{path.stem}.py"
        else:
            what = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(f"--config={given} {what}: name a file, or one of {', '.join(config_names())}")
    return f"{path}{colon}{variant}"


def find_model(workdir: str | os.PathLike[str]) -> str:
    """The folder itself, or of the model that comes along under this name where there is no such folder."""
    if not os.path.exists(workdir) and os.fspath(workdir) in model_names():
        return str(MODELS / workdir)
    return os.fspath(workdir)
