"""make demo: shows the shipped model's pictures, then trains TruePose from nothing in minutes, shows and judges that too.

    python -m truepose_jax.demo --workdir=runs/demo [--minutes=6] [--config=configs/demo.py --config.key=value]
    python -m truepose_jax.demo --judge=shipped|WORKDIR [--eval_seed=N] [--out=FILE.json] [--pictures=FILE.png]

Everybody shown is a synthetic person whom the models have never seen, in poses that they have never seen. Exit code 1 where
the model that was trained here misses a gate. --judge trains nothing: it judges the model that comes along, a run or an
export, on people of any seed. A demo that was stopped goes on where it was with the same command.
"""

from absl import flags

from truepose_jax.flags import train

ONLY_OF_TRAIN = (train.ESTIMATE, train.DISTRIBUTED, train.COORDINATOR, train.PROCESS, train.PROCESSES)
"""Flags that come with train's and mean nothing here."""

JUDGE = flags.DEFINE_string("judge", None, "Judge alone: 'shipped', the workdir of a run, or an export.")
EVAL_SEED = flags.DEFINE_integer("eval_seed", None, "With --judge: seed of the people (default: the run's own).", 0)
OUT = flags.DEFINE_string("out", None, "With --judge: write the figures there, as JSON.")
PICTURES = flags.DEFINE_string("pictures", None, "With --judge: write all pairs there, as a PNG.")
MINUTES = flags.DEFINE_float("minutes", 6.0, "Time for training from nothing, set-up included.", 0.1)

GROUPS = {
    "training from nothing": (train.WORKDIR, MINUTES, train.CONFIG, train.PROFILE),
    "judging alone": (JUDGE, EVAL_SEED, OUT, PICTURES),
}
