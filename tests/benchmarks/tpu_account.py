"""What test_tpu_train_step.py compiles in an environment with libtpu: a small network's train step, with its code."""

import dataclasses
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tpu_train_step  # noqa: E402

SMALL = {
    "block_out_channels": (320,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": (8,),
    "layers_per_block": 0,
}


def small(row, per_chip):
    config = _whole(row, per_chip)
    unet = dataclasses.replace(config.model.unet, **SMALL)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, unet=unet))


_whole, tpu_train_step.config_of = tpu_train_step.config_of, small


def main(folder: str) -> None:
    row, place = tpu_train_step.Row("v5e:2x2", 4, "256x176", True), pathlib.Path(folder)
    (place / "dump").mkdir(parents=True, exist_ok=True)
    tpu_train_step.compile_here(row, 1, place, code=True)
    kinds = ("buffer-assignment", "after_optimizations")
    texts = [next((place / "dump").glob(f"*.jit_step.*{kind}.txt")).read_text() for kind in kinds]
    found = tpu_train_step.account(*texts, row.chips)
    print(json.dumps(found | {"memory_analysis": json.loads((place / "whole.json").read_text())}))


if __name__ == "__main__":
    main(sys.argv[1])
