"""Prepare and inspect data.

    python -m truepose_jax.prepare build --dataset=deepfashion --raw=RAW --out=DIR --parsing=lip20 --size=512x352
    python -m truepose_jax.prepare label --raw=RAW --parsing=MODEL --pose=MODEL --detector=MODEL
    python -m truepose_jax.prepare annotate DIR --clip=CLIP --vae=VAE
    python -m truepose_jax.prepare check DIR
    python -m truepose_jax.prepare codec --images=FOLDER --size=256x176 --out=codec.safetensors
    python -m truepose_jax.prepare inspect --records=DIR --out=sheet.png
    python -m truepose_jax.prepare inspect --root=FOLDER --labels=cihp20 --out=sheet.png
    python -m truepose_jax.prepare inspect --synthetic=6 --out=sheet.png

`label` makes the parsing maps and poses that a raw folder lacks, by models of transformers (the [torch] extra). `build`
turns a raw dataset into records (input_pipeline/records/reader.py) and can be stopped and run again; `annotate` puts CLIP's
region tokens and VAE latents into them, so that training runs neither; `check` reads every record and says what is
wrong with it. `inspect` draws what the model will be told about each photo: the parsing map with its classes, the
skeleton, the region boxes CLIP sees, and the mask M for a target pose. Wrong label sets and swapped sides show at a
glance; it also prints, for every joint, the labels that lie under it. `codec` fits the linear autoencoder of
config.model.autoencoder "patches" to photos of one's own.

The work of `build`, `label`, `annotate` and `check` can be done in parts: --shard=I/N, in folders that all of them see, and
--shard=merge when all are done, for tables, metadata and the verdict. SLURM, Kubernetes and JAX_PROCESS_ID say the part where
nothing is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from truepose_jax.prepare.annotate import add_annotate
from truepose_jax.prepare.build import add_build
from truepose_jax.prepare.check import add_check
from truepose_jax.prepare.codec import add_codec
from truepose_jax.prepare.inspection import add_inspect
from truepose_jax.prepare.label import add_label
from truepose_jax.prepare.sheet import PANEL_HEIGHT
from truepose_jax.runtime.cli import Parser, program
from truepose_jax.runtime.shards import add_shard_flag, shard_of, signals_as_exits

SHARED = ("build", "label", "annotate", "check")
"""Sub-commands whose work comes in parts."""

__all__ = ["PANEL_HEIGHT", "main"]


@program
def main(argv: Sequence[str]) -> None:
    """Runs a sub-command; returns the exit code (2 and one line where the input is bad)."""
    parser = Parser(prog="python -m truepose_jax.prepare", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_build(commands)
    add_label(commands)
    add_annotate(commands)
    add_check(commands)
    add_codec(commands)
    add_inspect(commands)
    for name in SHARED:
        add_shard_flag(commands.choices[name])
    flags = parser.parse_args(argv)
    if flags.command not in SHARED:
        flags.run(flags)
        return
    with signals_as_exits():
        flags.run(flags, shard_of(flags.shard))
