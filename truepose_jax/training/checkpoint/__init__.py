"""What a run leaves on disk and how it goes on: checkpoints, metadata.json, the lock, the signal to stop.

    workdir/checkpoints/<step>/   {params, ema, rest, extra} by orbax, each part restorable alone; extra: JSON
    workdir/damaged/<step>/       steps that could not be read and were skipped (config.checkpoint.allow_fallback)
    workdir/metadata.json         resolved config, versions, devices, parameter table
    workdir/lock                  held by the one run that may write here

What goes wrong in here is a CheckpointError, one line for people, and fatal: a run never starts again from
scratch because its checkpoint could not be read.
"""

from truepose_jax.training.checkpoint.errors import CheckpointError, DamagedStep
from truepose_jax.training.checkpoint.preemption import STOPPED, Preemption
from truepose_jax.training.checkpoint.provenance import as_metadata, check_same_contents, data_digest
from truepose_jax.training.checkpoint.store import Checkpoints, without_closed_loops
from truepose_jax.training.checkpoint.workdir import (
    check_place,
    check_same_config,
    check_there,
    has_steps,
    lock_workdir,
    parameter_table,
    read_config,
    read_metadata,
    write_metadata,
)
