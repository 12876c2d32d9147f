"""Memory and speed of `evaluate`: peak resident memory must not grow with the number of images.

    python -m benchmarks.evaluate_memory --count=500 [--size=256x176] [--inception]

Each count is its own process (peak memory never falls): run it for several. Without --inception a stub stands in for
the network, whose time would hide the rest. Prints one JSON object.
"""

import argparse
import json
import pathlib
import resource
import shutil
import tempfile
import time

import numpy as np
from PIL import Image

from truepose_jax.evaluate.pairing import Folder, pair_folders
from truepose_jax.evaluate.protocols import PROTOCOLS
from truepose_jax.evaluate.scores import Scorer, score_pairs
from truepose_jax.evaluate.statistics import folder_statistics
from truepose_jax.runtime.cli import parse_size

DISTINCT = 16
"""Different photos; the rest are copies under other names."""


class Stub:
    metric, sha256 = "fid", "0" * 64

    @staticmethod
    def apply(batch):
        return np.tile(batch.reshape(len(batch), -1)[:, :64], (1, 32))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--size", type=parse_size, default=(256, 176))
    parser.add_argument("--inception", action="store_true", help="torchvision's network with random weights")
    flags = parser.parse_args()
    network = Stub
    with tempfile.TemporaryDirectory() as root:
        if flags.inception:
            from tests.metrics.torch_networks import save_weights
            from truepose_jax.evaluate.weights import load

            network = load("fid", str(save_weights(pathlib.Path(root), "fid", 0)[0]))
        folders = [
            make_folder(pathlib.Path(root, name), flags.count, flags.size, seed) for seed, name in enumerate("ab")
        ]
        before, protocol = peak(), PROTOCOLS["cfld"]
        start = time.perf_counter()
        how = {"cache": pathlib.Path(root, "cache"), "batch_size": 32}
        folder_statistics(folders[1], network, protocol, flags.size, role="truth", title="fid", **how)
        middle, fid_seconds = peak(), time.perf_counter() - start
        pairs = pair_folders(*folders).pairs
        start = time.perf_counter()
        rows = score_pairs(Scorer(*folders, protocol, flags.size, None, None), pairs, settings={}, **how)
        seconds = time.perf_counter() - start
        print(
            json.dumps(
                {
                    "images": flags.count,
                    "rows": sum(1 for _ in rows),
                    "peak_MB_before": before,
                    "peak_MB_statistics": middle,
                    "peak_MB_pairs": peak(),
                    "statistics_images_per_second": round(flags.count / fid_seconds, 1),
                    "pairs_per_second": round(flags.count / seconds, 1),
                }
            )
        )


def make_folder(root: pathlib.Path, count: int, size: tuple[int, int], seed: int) -> Folder:
    root.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        if i < DISTINCT:
            coarse = rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(root / f"{i:06d}.png")
        else:
            shutil.copy(root / f"{i % DISTINCT:06d}.png", root / f"{i:06d}.png")
    return Folder.read(str(root), flag="--root")


def peak() -> int:
    """Peak resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
