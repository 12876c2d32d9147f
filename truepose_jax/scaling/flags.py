"""Large-batch scaling studies: how far does a larger batch, or more devices, help this configuration?

    python -m truepose_jax.scaling --config=configs/demo.py --study=batch   --out=DIR --target=0.2 --examples=20000
    python -m truepose_jax.scaling --config=configs/demo.py --study=devices --out=DIR --devices=1,2,4,8
    python -m truepose_jax.scaling --config=configs/demo.py --study=memory  --out=DIR --sizes=64x48,128x96 --fsdp=1,8

batch: steps to a held-out loss at each batch size, gradient noise scale, critical batch. devices: weak and strong scaling
on the devices at hand; with --topologies also a plan for TPU slices. memory: the largest batch per device by size,
precision, rematerialisation and FSDP.

Rows are kept in DIR/rows.csv and rows.json as they are done; run the same command again to go on, or with more batch
sizes, curves, devices or sizes to add rows. DIR/report.md is written at the end, with its figures. --dry-run lists what
would be run. TPU slices are compiled for by the Python that --tpu-python names, of an environment with jax[tpu].
"""

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file under configs/.", lock_config=True)
STUDY = flags.DEFINE_enum("study", None, ("batch", "devices", "memory"), "What to study.")
OUT = flags.DEFINE_string("out", None, "Folder for rows, report and the runs' own folders.")
DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the runs, and end.")

BATCHES = flags.DEFINE_list("batches", ["12", "24", "48", "96", "192"], "global batch sizes.")
CURVES = flags.DEFINE_string(
    "curves", "adamw/none,adamw/sqrt,adamw/linear,lamb/sqrt", "OPTIMIZER/RULE of the learning rate, ..."
)
TARGET = flags.DEFINE_float("target", 0.0, "held-out loss to reach; 0: every run sees --examples.", lower_bound=0)
EXAMPLES = flags.DEFINE_integer("examples", 20_000, "the most examples that a run sees.", lower_bound=1)
MICRO = flags.DEFINE_integer("micro", 0, "examples per micro-batch; 0: half the smallest batch.", lower_bound=0)
REFERENCE = flags.DEFINE_integer(
    "reference", 0, "the size with the config's learning rate; 0: the config's batch_size.", lower_bound=0
)
LAMB_RATE = flags.DEFINE_float("lamb_rate", 0.02, "LAMB's learning rate at the reference batch.", lower_bound=0)
SEEDS = flags.DEFINE_integer("seeds", 1, "how many seeds, from config.seed on.", lower_bound=1)

DEVICES = flags.DEFINE_list("devices", [], "counts, or none; empty: 1, 2, 4, ... of those at hand (CPU: 1, 2, 4).")
PER_DEVICE = flags.DEFINE_integer("per_device", 0, "weak scaling's batch per device; 0: config.batch_size.")
STRONG = flags.DEFINE_integer("strong", 0, "strong scaling's global batch; 0: per_device x most devices.")
STEPS = flags.DEFINE_integer("steps", 10, "timed steps per figure.", lower_bound=1)

SIZES = flags.DEFINE_list("sizes", [], "HEIGHTxWIDTH, ...; empty: the config's.")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "compute dtypes.")
REMAT = flags.DEFINE_list("remat", ["off", "on"], "rematerialisation.")
FSDP = flags.DEFINE_list("fsdp", ["1", "8"], "devices that parameters are cut over.")
MEMORY_GIB = flags.DEFINE_float("memory_gib", 0.0, "per device; 0: the device's own.", lower_bound=0)
RESOLUTION = flags.DEFINE_float("resolution", 0.02, "relative error that is good enough.", 0.0, 1.0)

TOPOLOGIES = flags.DEFINE_list("topologies", [], "devices, memory: TPU slices such as v5e:16x16, v5p:4x4x4, v6e:8x8.")
TPU_PYTHON = flags.DEFINE_string("tpu-python", "", "Python with jax[tpu] and this package's needs, for --topologies.")

GROUPS = {
    "the study": (CONFIG, STUDY, OUT, DRY_RUN),
    "batch": (BATCHES, CURVES, TARGET, EXAMPLES, MICRO, REFERENCE, LAMB_RATE, SEEDS),
    "devices": (DEVICES, PER_DEVICE, STRONG, STEPS),
    "memory": (SIZES, DTYPES, REMAT, FSDP, MEMORY_GIB, RESOLUTION),
    "TPU slices": (TOPOLOGIES, TPU_PYTHON),
}
