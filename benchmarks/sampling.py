"""Seconds to sample pictures, ours against PyTorch's. Writes benchmarks/results/sampling.{json,md}.

    python benchmarks/sampling.py                         # two CPU cores, a narrow network
    python benchmarks/sampling.py --device=gpu --full     # the full network: 512x352 and 256x176, bfloat16

35 steps of DDIM with guidance from the same noise to latents, batch 1 and 8. Ours runs the source's side once; the peer once
(cached) or at every step (recompute, for the conditional half). Rows that are in the JSON are not measured again. The latents
must agree before anything is timed. benchmarks/side_by_side.py says the rest.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import Row, add_flags, case_of, check_flags, row_of, run
from benchmarks.side_by_side_forms import PEERS
from benchmarks.tables import result
from truepose_jax.runtime.cli import Parser, program

BATCHES = (1, 8)
STEPS, GUIDANCE = 35, 3.5
CPU_PEERS = {
    1: ("recompute_eager", "recompute_eager_nhwc", "cached_eager", "cached_eager_nhwc", "cached_compiled"),
    8: ("recompute_eager", "cached_eager", "cached_eager_nhwc"),
}
CPU_REPEATS = {1: 5, 8: 3}
"""By batch; torch.compile takes minutes on a CPU and is measured once."""


def rows(flags) -> list[Row]:
    sizes = [flags.size] if flags.size else [(512, 352), (256, 176)] if flags.full else [(128, 88)]
    made = []
    for size, batch in itertools.product(sizes, flags.batch or BATCHES):
        case = case_of(flags, "sample", size, batch, steps=flags.steps, guidance=GUIDANCE)
        peers = CPU_PEERS.get(batch, CPU_PEERS[8]) if flags.device == "cpu" else PEERS["sample"]
        made.append(row_of(flags, case, peers, 10 if flags.full else CPU_REPEATS.get(batch, 3)))
    return made


@program
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--steps", type=int, default=STEPS, help="of DDIM")
    flags = parser.parse_args(argv)
    check_flags(parser, flags, PEERS["sample"])
    if not 1 <= flags.steps <= 1000:
        parser.error(f"--steps is {flags.steps}; it must be from 1 to 1000")
    return run(result(parser, flags.out, "sampling"), "Sampling, ours and PyTorch's", rows(flags), flags)


if __name__ == "__main__":
    sys.exit(main())
