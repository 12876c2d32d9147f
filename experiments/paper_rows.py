"""One command for each row of the paper's tables: train, generate the split, evaluate. For whoever has data and weights.

    python experiments/paper_rows.py --row=512 --data=DEEPFASHION --photos=PHOTOS --weights=WEIGHTS --out=runs/paper [--dry-run]
    python experiments/paper_rows.py --row=B3  --data=DEEPFASHION --photos=PHOTOS --weights=WEIGHTS --out=runs/paper
    python experiments/paper_rows.py --row=wpose --data=WPOSE --photos=PHOTOS --run=runs/paper/512/run --out=runs/paper
    python experiments/paper_rows.py --row=real --data=DEEPFASHION --photos=PHOTOS --out=runs/paper --metrics="..."
    python experiments/paper_rows.py --row=512 --stand-in --out=runs/stand_in

DEEPFASHION, WPOSE: what `prepare build` and `prepare annotate` wrote; PHOTOS: the folder of the photos alone that they were
built from (RAW/img_highres; WPose: RAW/images), which the metrics resize as the protocol says. WEIGHTS: what
`convert from-torch` wrote. --metrics hands arguments on to evaluate, such as
"--lpips-weights=FILE --fid-weights=FILE --fid-reference=PHOTOS --fid-names=train.lst". Training and generating go on where
they were stopped; evaluating is done every time, from its cache where nothing changed. --stand-in runs the row's own steps on
a few synthetic people with a tiny network: it shows that the commands work, and its numbers mean nothing.

| row | paper | LPIPS | SSIM | PSNR | FID |
|---|---|---|---|---|---|
| 512, 256 | Table 1, DeepFashion 512x352 and 256x176 | .180, .151 | .744, .727 | 17.627, 18.123 | 7.05, 7.265 |
| B1 | Table 2, 512x352: CLIP for SourceNet | .2762 | .6895 | 14.613 | 11.982 |
| B2 | concatenated self-attention, no CAA | .2081 | .7059 | 16.267 | 7.647 |
| B3 | without CAA | .1874 | .7363 | 17.426 | 7.513 |
| B4 | without HPFA | .2077 | .7149 | 16.686 | 7.358 |
| wpose | WPose (UniHuman), zero-shot with the 512 run, 2,304 pairs; no FID | .583 | .331 | 11.457 | |
| real | Table 1, the test photos themselves, 512x352: first of all, for FID's preprocessing | 0 | 1 | inf | 8.028 |
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from input_pipeline.annotations.keypoints import patn_name
from input_pipeline.annotations.photo import read_photo
from input_pipeline.records.reader import RecordImages
from input_pipeline.schema import InputError
from truepose_jax.evaluate.pairing import Folder, image_key
from truepose_jax.evaluate.protocols import PIL_BICUBIC
from truepose_jax.runtime.cli import Parser, program
from truepose_jax.sampling.image_grid import save_png

ROWS = ("512", "256", "B1", "B2", "B3", "B4", "wpose", "real")
NEEDED = {"wpose": "run", "real": None}
"""Beside --data and --photos; of the other rows it is --weights."""
STAND_IN_SIZE = (80, 56)
"""The least that the field's SSIM window of 51 fits into, and four divides."""
STAND_IN = (
    "--config.model.size=(80,56)",
    "--config.total_steps=4",
    "--config.batch_size=4",
    "--config.model.autoencoder=pixels",
    "--config.model.pixel_factor=4",
    "--config.model.unet.in_channels=48",
    "--config.model.unet.out_channels=48",
    "--config.model.unet.block_out_channels=(16,)",
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',)",
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',)",
    "--config.model.unet.layers_per_block=1",
    "--config.model.unet.attention_head_dim=(2,)",
    "--config.model.unet.norm_num_groups=4",
    "--config.model.remat=false",
    "--config.data.flip=false",
    "--config.data.threads=1",
    "--config.eval.pairs=2",
    "--config.eval.batch_size=2",
    "--config.eval.steps=2",
    "--config.diffusion.steps=2",
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--data", type=pathlib.Path, help="records of DeepFashion (row wpose: of WPose)")
    parser.add_argument("--photos", type=pathlib.Path, help="folder of the photos that --data was built from")
    parser.add_argument("--weights", type=pathlib.Path, help="SD1.5 and CLIP as `convert from-torch` wrote them")
    parser.add_argument("--run", type=pathlib.Path, help="row wpose: the workdir of the 512 run")
    parser.add_argument("--metrics", metavar="ARGS", default="", help="further arguments of evaluate")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--stand-in", action="store_true", help="a few synthetic people and a tiny network")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    flags = parser.parse_args(argv)
    if flags.run is not None and flags.row != "wpose":
        parser.error(f"--run is for the row wpose, and --row={flags.row} reads none")
    flags.size = (256, 176) if flags.row == "256" else (512, 352)
    if flags.stand_in:
        flags.data, flags.photos, flags.size = flags.out / "people", flags.out / "photos", STAND_IN_SIZE
    else:
        for name in filter(None, ("data", "photos", NEEDED.get(flags.row, "weights"))):
            path = getattr(flags, name)
            if path is None:
                parser.error(f"--{name} is missing (or try --stand-in)")
            if not flags.dry_run and not path.is_dir():
                parser.error(f"--{name}={path} is no folder")
    return flags


def steps(flags: argparse.Namespace) -> list[tuple[pathlib.Path | None, list[str]]]:
    """[(what a step is not needed for any more, once it is there; None: the program sees for itself), its command]."""
    folder = flags.out / flags.row
    data, (h, w), found = flags.data, flags.size, []
    run = flags.run or folder / "run"
    if flags.stand_in:
        build = ["prepare", "build", "--dataset=synthetic", f"--size={h}x{w}", "--limit=60", f"--out={data}"]
        found.append((data / "dataset_info.json", build))
    if flags.run is None and flags.row != "real":
        variant = f":{flags.row}" if flags.row.startswith("B") else ""
        config = f"--config=configs/truepose_deepfashion_{'256' if flags.row == '256' else '512'}.py{variant}"
        start = STAND_IN if flags.stand_in else [f"--config.init_from={flags.weights}"]
        found.append((None, ["train", config, f"--workdir={run}", f"--config.data.root={data}", *start]))
    pictures = folder / "generated"
    if flags.row != "real":
        generate = ["generate", f"--workdir={run}", f"--records={data}", "--naming=cfld", f"--out-dir={pictures}"]
        found.append((None, generate))
    report = folder / "report.json"
    evaluate = [
        "evaluate",
        f"--generated={pictures}",
        f"--reference={flags.photos}",
        f"--pairs={pictures / 'pairs.csv'}",
    ]
    evaluate += ["--protocol=cfld", f"--size={h}x{w}", f"--out={report}", "--overwrite"]
    found.append((None, [*evaluate, *shlex.split(flags.metrics)]))
    return found


def write_photos(records: pathlib.Path, folder: pathlib.Path) -> None:
    """The stand-in's photos as files, under the records' names; those of training too, as real folders hold them."""
    for split in ("train", "test"):
        images = RecordImages(records, split, size=STAND_IN_SIZE)
        for record in map(images.image, range(len(images))):
            save_png(record.image, folder / f"{record.name}.png")


def write_real(records: pathlib.Path, photos: pathlib.Path, folder: pathlib.Path, size: tuple[int, int]) -> None:
    """The test split's targets at `size`, resized like every protocol's truth, as if they were generated; and pairs.csv.
    What is there stays: it goes on where it was stopped. Raises InputError where a photo is not there."""
    images, files = RecordImages(records, "test", size=size), Folder.read(str(photos), flag="--photos")
    by_key, pairs = files.by_key(), []
    folder.mkdir(parents=True, exist_ok=True)
    for target in tqdm.tqdm(sorted({int(target) for _, target in images.pairs}), desc="real", unit="photo"):
        name = patn_name(images.names[target])
        if (file := by_key.get(image_key(name))) is None:
            raise InputError(f"--photos={photos} has no {images.names[target]}, which --data={records} names")
        if not (out := folder / f"{name}.png").exists():
            save_png(PIL_BICUBIC.resize(read_photo(files.path(file)), size).astype("uint8"), out)
        pairs.append((name, name))
    with (folder / "pairs.csv").open("w", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows([("from", "to"), *pairs])


@program
def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    for made, command in steps(flags):
        print("python -m " + shlex.join([f"truepose_jax.{command[0]}", *command[1:]]), flush=True)
        if flags.dry_run or (made is not None and made.exists()):
            continue
        if command[0] == "evaluate" and flags.stand_in:
            write_photos(flags.data, flags.photos)
        if command[0] == "evaluate" and flags.row == "real":
            write_real(flags.data, flags.photos, flags.out / flags.row / "generated", flags.size)
        code = subprocess.run(
            [sys.executable, "-m", f"truepose_jax.{command[0]}", *command[1:]],
        ).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
