"""Trains: python -m truepose_jax.train --config=configs/demo.py --workdir=DIR [--config.key=value].

Run the same command again to go on where it stopped. Every setting, its range and its default: truepose_jax/config/schema.py.
"""

from absl import flags
from ml_collections import config_flags

from truepose_jax.runtime.distributed import MODES

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file under configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go.")
DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", MODES, "Whether to join other processes.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --process and --processes.")
PROCESS = flags.DEFINE_integer("process", None, "This process: 0, 1, ...")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
ESTIMATE = flags.DEFINE_bool("estimate", False, "Print how much memory the run will take on a device, and end.")
MEMORY = flags.DEFINE_float(
    "memory", None, "With --estimate: GiB that a program may have, for the largest batch in them."
)
PROFILE = flags.DEFINE_bool("profile", False, "Write a profiler trace of five steps to WORKDIR/profile.")

GROUPS = {
    "the run": (CONFIG, WORKDIR),
    "beforehand": (ESTIMATE, MEMORY),
    "while it runs": (PROFILE,),
    "several processes": (DISTRIBUTED, COORDINATOR, PROCESS, PROCESSES),
}
