"""`prepare annotate`: CLIP's region tokens and the VAE's latents into records that `prepare build` wrote."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from input_pipeline.annotations.parsing import label_set
from input_pipeline.batches.transforms import flip_record
from input_pipeline.fields import LATENT_FACTOR
from input_pipeline.records.annotate import annotations, rewrite_records
from input_pipeline.records.reader import read_json
from input_pipeline.records.schema import pack_latents, pack_tokens
from input_pipeline.schema import ImageRecord, InputError
from input_pipeline.shards import Shard
from truepose_jax.runtime import files
from truepose_jax.runtime.cli import parse_size

VAE_BATCH = 8
"""Pictures the VAE encodes at once: at 512x352 in float32 the encoder takes about 0.5 GB each."""


def add_annotate(commands) -> None:
    """The flags of `annotate`."""
    parser = commands.add_parser(
        "annotate", help="put CLIP's region tokens and VAE latents into records; run again to go on after a stop"
    )
    parser.add_argument("records", help="folder that `prepare build` wrote")
    parser.add_argument("--clip", metavar="DIR", help="transformers folder of CLIP's vision tower: store region tokens")
    parser.add_argument("--vae", metavar="DIR", help="diffusers folder of SD1.5's autoencoder: store latents")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="config.model.size (default: the build's --size)"
    )
    parser.add_argument("--batch-size", type=int, default=VAE_BATCH, help=f"pictures in the VAE at once ({VAE_BATCH})")
    parser.set_defaults(run=annotate)


def annotate(flags: argparse.Namespace, share: Shard) -> None:
    """Annotates the records of the flags. Raises InputError and ConfigError before any long work."""
    if not flags.clip and not flags.vae:
        raise InputError("nothing to do: give --clip=DIR for region tokens, --vae=DIR for latents, or both")
    if flags.batch_size < 1:
        raise InputError(f"--batch-size is {flags.batch_size}; it must be 1 or more")
    root = pathlib.Path(flags.records)
    if not (root / "dataset_info.json").is_file():
        raise InputError(f"{root}: not a finished build; give the folder that `prepare build --out` wrote")
    built = read_json(root / "metadata.json")
    size = flags.size or built.get("size") or built.get("settings", {}).get("size")
    if size is None:
        raise InputError(f"{root}: its photos have no one size; say --size=HxW, the config.model.size to train at")
    size = (int(size[0]), int(size[1]))
    if any(side % LATENT_FACTOR for side in size):
        raise InputError(f"--size is {size[0]}x{size[1]}; both sides must be divisible by {LATENT_FACTOR}")
    if not {name for name in ("clip", "vae") if getattr(flags, name)} <= annotations(root).keys():
        files.make_folder(root / "build")  # before the networks are loaded
    wanted: dict[str, dict[str, Any]] = {}
    annotators: list[Annotator] = []
    for name, folder, make in (("clip", flags.clip, clip_annotator), ("vae", flags.vae, vae_annotator)):
        if folder:
            told, annotator = make(folder, size, flags.batch_size)
            if annotations(root).get(name) == told:
                print(f"{root}: holds these {annotator.what} already")
                continue
            wanted[name] = told
            annotators.append(annotator)
    if not wanted:
        return

    def fill(records: Sequence[ImageRecord | None], labels: str) -> list[dict[str, Any]]:
        changes: list[dict[str, Any]] = [{} for _ in records]
        mirrored = [None if r is None else flip_record(r, label_set(labels)) for r in records]
        for annotator in annotators:
            for kind, images in (("", records), ("flipped_", mirrored)):
                for change, fields in zip(changes, annotator.fields(images, labels), strict=True):
                    change |= {f"{kind}{field}": value for field, value in fields.items()}
        if "vae" in wanted:
            for change in changes:
                change["latents_size"] = np.array(size, np.int32)
        return changes

    broken = rewrite_records(root, wanted, fill, size=size, share=share)
    if broken is None:
        print(f"{root}: {share} is done")
        return
    told = f"; {broken} photos could not be read and have none" if broken else ""
    print(f"{root}: {' and '.join(a.what for a in annotators)} of pictures of {size[0]}x{size[1]}, mirrored too{told}")


@dataclasses.dataclass(frozen=True)
class Annotator:
    """fields(images, labels): the record fields of each (of the photos as they are given; {} for None)."""

    what: str
    fields: Callable[[Sequence[ImageRecord | None], str], list[dict[str, Any]]]


def clip_annotator(folder: str, size: tuple[int, int], batch: int) -> tuple[Mapping[str, Any], Annotator]:
    """(what metadata.json says of them, the annotator) of the region tokens of a CLIP folder. Raises ConfigError."""
    del batch  # crops of 224 pixels: CLIP's own batches do
    from truepose_jax.pretrained.region_tokens import load_encoder

    encoder = load_encoder(folder)

    def fields(images: Sequence[ImageRecord | None], labels: str) -> list[dict[str, Any]]:
        found = []
        for tokens, valid in zip(*encoder.tokens(images, labels), strict=True):
            data, bits = pack_tokens(tokens, valid)
            found.append({"region_tokens": data, "region_valid": bits})
        return found

    told = {"fingerprint": encoder.fingerprint, "width": encoder.config.projection_dim}
    return {**told, "size": list(size), "flipped": True}, Annotator("region tokens", fields)


def vae_annotator(folder: str, size: tuple[int, int], batch: int) -> tuple[Mapping[str, Any], Annotator]:
    """The same of the latents of a VAE folder, computed in float32."""
    import jax

    from truepose_jax.pretrained.frozen_networks import load_vae

    autoencoder, params, fingerprint = load_vae(folder)
    encode = jax.jit(lambda params, images: autoencoder.module.apply({"params": params}, images, method="encode"))

    def fields(images: Sequence[ImageRecord | None], labels: str) -> list[dict[str, Any]]:
        del labels
        found: list[dict[str, Any]] = [{} for _ in images]
        there = [i for i, image in enumerate(images) if image is not None]
        for start in range(0, len(there), batch):
            rows = there[start : start + batch]
            pictures = np.zeros((batch, *size, 3), np.float32)  # one size, so one program
            for place, row in enumerate(rows):
                cv2.divide(images[row].image.astype(np.float32), 127.5, dst=pictures[place])
            pictures -= 1
            mean, log_variance = (np.asarray(x) for x in encode(params, pictures))
            for place, row in enumerate(rows):
                found[row] = {"latents": pack_latents(mean[place], log_variance[place])}
        return found

    return {"fingerprint": fingerprint, "size": list(size), "flipped": True}, Annotator("latents", fields)
