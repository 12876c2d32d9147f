"""Opening 10^5 to 10^7 records: processor time to the first batch, memory, open files. Writes JSON and Markdown.

    python benchmarks/big_records.py [--images=100000,1000000,10000000] [--out=benchmarks/results]

The records are fakes that cost no disk: drawn people of 64x48 with random region tokens of 768, one shard of them, and every
other shard a hard link to it. Tables are whole: a name and an identity for each image, three pairs an image. What is timed is a
process of its own that does what training does: it opens the folder, makes the loader (uint8, mirrored half the time, tokens
from the records) and draws batches at random over all shards. `first batch` counts from the start of Python, imports with it.
10^7 take 1.2 GB of disk in a temporary folder (TMPDIR).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.tables import RESULTS, ROOT, machine, write
from input_pipeline.records.annotate import rewrite_records
from input_pipeline.records.reader import OPEN_SHARDS, RecordImages
from input_pipeline.records.schema import RecordWriter, pack_tokens
from input_pipeline.records.tables import image_dtype, table_files
from input_pipeline.records.writer import build_records, records_of_a_shard
from input_pipeline.sources.own_photos import synthetic_people
from truepose_jax.runtime.markdown import table

SIZE, WIDTH, BATCH, POSES = (64, 48), 768, 60, 4
AFTER = 20
"""Batches after the first."""
TABLE_ROWS = 1 << 20
"""Written at once."""


def fake(folder: pathlib.Path, images: int) -> None:
    """A finished build of so many images."""
    build_records(synthetic_people(pairs=12, size=SIZE), folder)
    random = np.random.default_rng(0)
    valid = np.isin(np.arange(21), (1, 2, 3, 4, 5, 6, 12, 20))
    filled = dict(
        zip(
            ("region_tokens", "region_valid", "flipped_region_tokens", "flipped_region_valid"),
            2 * pack_tokens(random.standard_normal((21, WIDTH)), valid),
            strict=True,
        )
    )
    rewrite_records(folder, {"clip": {}}, lambda records, labels: [filled for _ in records], size=SIZE)
    (shard,) = folder.glob("*-train.array_record-*")
    stem = shard.name.removesuffix("-00000-of-00001")
    few, each = RecordImages(folder, "train"), records_of_a_shard(images)
    kinds = [dict(few.fields(index)) for index in range(len(few))]
    shard.unlink()
    lengths = [each] * (images // each) + [images % each] * (images % each > 0)
    one = folder / "shard"
    RecordWriter().write_shard(one, [kinds[i % len(kinds)] for i in range(each)])
    for number in range(len(lengths)):
        os.link(one, folder / f"{stem}-{number:05d}-of-{len(lengths):05d}")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"] = [s | {"shardLengths": list(map(str, lengths))} for s in info["splits"] if s["name"] == "train"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    table_file, pairs_file = (folder / name for name in table_files("train"))
    table = np.lib.format.open_memmap(table_file, "w+", image_dtype(40, 24), (images,))
    pairs = np.lib.format.open_memmap(pairs_file, "w+", np.dtype(np.int32), (images * (POSES - 1), 2))
    for start in range(0, images, TABLE_ROWS):
        rows = np.arange(start, min(start + TABLE_ROWS, images))
        people = np.char.add(b"id_", np.char.zfill((rows // POSES).astype("S8"), 8))
        poses = np.char.add(b"_", (rows % POSES).astype("S1"))
        part = table[start : start + len(rows)]
        part["identity"], part["name"] = people, np.char.add(np.char.add(people, poses), b"_front_0001.jpg")
        part["height"], part["width"], part["joints"] = *SIZE, 18
        others = rows[:, None] // POSES * POSES + (rows[:, None] + np.arange(1, POSES)) % POSES
        where = slice(start * (POSES - 1), (start + len(rows)) * (POSES - 1))
        pairs[where] = np.stack([np.repeat(rows, POSES - 1), others.reshape(-1)], axis=1)


def measure(folder: str, targets: int) -> dict:
    """In a process of its own: what training does until it has batches."""
    from input_pipeline.batches.loader import make_loader
    from input_pipeline.batches.readers import RecordTokens
    from input_pipeline.fields import Layout
    from truepose_jax.config import Config
    from truepose_jax.methods import needs

    imported = time.process_time()
    images = RecordImages(folder, "train", size=SIZE)
    opened = time.process_time()
    layout = Layout(needs(Config()).train, "uint8", {"e": WIDTH})
    tokens = RecordTokens(images, WIDTH, True)
    settings = {"seed": 0, "batch_size": BATCH, "flip": True, "targets_per_source": targets}
    loader = make_loader(images, tokens, layout, **settings)
    assert next(loader)["valid"].all()
    cpu, wall = time.process_time(), time.time() - _started()
    first = _memory()
    for _ in range(AFTER):
        assert next(loader)["valid"].all()
    after = time.process_time() - cpu
    return {
        "imports_cpu_s": round(imported, 2),
        "open_cpu_s": round(opened - imported, 2),
        "first_batch_cpu_s": round(cpu, 2),
        "first_batch_wall_s": round(wall, 2),
        "rss_first_batch_mib": first,
        "rss_later_mib": _memory(),
        "open_shards": sum("array_record-" in os.path.realpath(f) for f in pathlib.Path("/proc/self/fd").iterdir()),
        "ms_a_pair": round(1000 * after / (AFTER * BATCH), 2),
    }


def _started() -> float:
    """When this process began, in seconds since 1970."""
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def _memory() -> int:
    """MiB of memory of this process, mapped pages of files with it."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def report(found: dict) -> str:
    names = ("images", "shards", "targets", "open_cpu_s", "first_batch_cpu_s", "first_batch_wall_s", "rss_first_batch_mib",
             "rss_later_mib", "open_shards", "ms_a_pair")  # fmt: skip
    heads = ("images", "shards", "targets a source", "open, CPU s", "first batch, CPU s", "wall s", "RSS MiB",
             f"MiB {AFTER} batches later", "shards open", "CPU ms a pair")  # fmt: skip
    about = found["about"]
    return "\n".join(
        [
            "# Opening many records",
            "",
            f"`python benchmarks/big_records.py` on {about['machine']}, {about['when']}, load {about['load']}: other programs "
            f"ran, so wall times are long. Batches of {BATCH}; at most {about['most_open_shards']} shards are open at once. RSS "
            "counts mapped pages of the tables, which the system takes back when it needs them.",
            "",
            *table(heads, [[f"{row[name]:,}" for name in names] for row in found["rows"]]),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="100000,1000000,10000000")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "TARGETS"), help="of one folder that is there, as JSON")
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.measure[0], int(flags.measure[1]))))
        return
    rows = []
    for images in map(int, flags.images.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            records = pathlib.Path(folder) / "records"
            fake(records, images)
            shards = -(-images // records_of_a_shard(images))
            for targets in (1, 4):
                command = [sys.executable, __file__, "--measure", str(records), str(targets)]
                found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
                rows.append({"images": images, "shards": shards, "targets": targets} | json.loads(found.splitlines()[-1]))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    about = {
        "machine": f"{os.cpu_count()} cores of {machine()['cpu']}, Python {platform.python_version()}",
        "when": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
        "most_open_shards": OPEN_SHARDS,
    }
    found = {"about": about, "rows": rows}
    write(flags.out / "big_records.json", found, report(found))
    print(report(found))


if __name__ == "__main__":
    main()
