"""How many synthetic people one core renders a second. Prints one JSON object.

    python benchmarks/synthetic_speed.py [--images=200]

`warm` renders 8 poses of each person, as a training set of several poses per identity does; `cold` renders a
new person in a new pose each time, so that wardrobe, background and pose are made anew too. Rates are images per
CPU second of this process (other work on the machine disturbs them less than the wall clock's, given as well).
"""

import argparse
import json
import pathlib
import sys
import time

import cv2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from input_pipeline.synthetic.people import render

SIZES = ((64, 48), (256, 176), (512, 352))


def rate(size: tuple[int, int], images: int, poses_per_identity: int) -> dict[str, float]:
    """Images per CPU second and per wall second at (h, w)."""
    first = 10_000 * poses_per_identity + size[0]  # nobody rendered before

    def one(i: int) -> None:
        render(seed=0, identity=first + i // poses_per_identity, pose=2 * (first + i), size=size)

    for i in range(8):
        one(i)
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(8, 8 + images):
        one(i)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"images_per_cpu_second": round(images / cpu, 1), "images_per_second": round(images / wall, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    images = parser.parse_args().images
    cv2.setNumThreads(1)
    report = {"cores": 1, "images": images, "cv2": cv2.__version__}
    for size in SIZES:
        n = images if size[0] <= 256 else max(20, images // 4)
        report[f"{size[0]}x{size[1]}"] = {"warm": rate(size, n, 8), "cold": rate(size, n, 1)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
