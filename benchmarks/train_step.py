"""Seconds of a training step, ours against PyTorch's. Writes benchmarks/results/train_step.{json,md}.

    python benchmarks/train_step.py                         # two CPU cores, a narrow network
    python benchmarks/train_step.py --device=gpu --full     # the full network: 512x352 and 256x176, bfloat16

A step is loss, gradients of every parameter, clipping by their norm and AdamW, from latents. Rows that are in the JSON are not
measured again. The losses of three steps must agree before anything is timed. benchmarks/side_by_side.py says the rest.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import Row, add_flags, case_of, check_flags, row_of, run
from benchmarks.side_by_side_forms import PEERS
from benchmarks.tables import result
from truepose_jax.runtime.cli import Parser, program

FULL = (
    ((512, 352), 2, False, False),
    ((256, 176), 8, False, False),
    ((512, 352), 12, False, True),
    ((256, 176), 60, False, True),
)
"""(size, batch, rematerialisation, apart): batches at which one card holds ours and a peer at once (28.9 GB each of weights,
gradients and AdamW's moments), and what the paper trained with, one form after the other."""
CPU_PEERS, GPU_PEERS = ("eager", "eager_nhwc", "compiled"), PEERS["train"]


def rows(flags) -> list[Row]:
    if flags.full:
        chosen = [each for each in FULL if flags.batch is None or each[1] in flags.batch]
    else:
        chosen = [(flags.size or (256, 176), batch, False, False) for batch in flags.batch or (2,)]
    peers, repeats = CPU_PEERS if flags.device == "cpu" else GPU_PEERS, 20 if flags.full else 9
    return [
        row_of(flags, case_of(flags, "train", size, batch, remat=remat), peers, repeats, apart=apart)
        for size, batch, remat, apart in chosen
    ]


@program
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    add_flags(parser)
    flags = parser.parse_args(argv)
    check_flags(parser, flags, PEERS["train"])
    if flags.full and flags.size:
        parser.error("--full has sizes of its own; choose a row by --batch, or leave --size or --full out")
    batches = [batch for _, batch, _, _ in FULL]
    for batch in flags.batch or ():
        if flags.full and batch not in batches:
            parser.error(f"--full has no row of --batch={batch}; choose of {', '.join(map(str, batches))}")
    path = result(parser, flags.out, "train_step")
    return run(path, "A training step, ours and PyTorch's", rows(flags), flags)


if __name__ == "__main__":
    sys.exit(main())
