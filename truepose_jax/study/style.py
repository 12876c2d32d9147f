"""`study style`: style transfer (TruePose section 5.4) among synthetic people, none of them chosen: person i lends the style,
person i + 1 is the reference, whose garments are made anew."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import cv2
import numpy as np
from PIL import Image

from input_pipeline.schema import InputError
from truepose_jax.inference.pipeline import Pipeline, Request, Run
from truepose_jax.runtime.choices import SYNTHETIC
from truepose_jax.runtime.cli import enable_compilation_cache
from truepose_jax.sampling.image_grid import sheet
from truepose_jax.sampling.inpainting import Edit, class_mask
from truepose_jax.study.samples import read_samples


def study_style(flags: argparse.Namespace) -> None:
    """Draws style, reference, region, the style's person in the reference's pose, and the transfer."""
    out = pathlib.Path(flags.out)
    if out.suffix.lower() != ".png" or (out.exists() and not flags.overwrite):
        raise InputError(f"{out}: is there already, or does not end in .png; give another --out, or --overwrite")
    run = Run.open(flags.workdir)
    run.sampling(flags.steps, flags.guidance)
    people, labels = read_samples(SYNTHETIC, run.config, 2 * flags.count)
    rows, plain, edited = list(zip(people[::2], people[1::2], strict=True)), [], []
    for style, reference in rows:
        mask = class_mask(reference.parsing, labels, flags.classes)
        if not mask.any():
            raise InputError(f"--classes={flags.classes}: {reference.name} wears none of them")
        mask = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0  # pixels of an edge show both sides
        request = Request(
            style.photo, reference.own_joints, style.parsing, labels.name, name=style.name, seed=flags.seed
        )
        if run.config.model.carry.head:
            request = dataclasses.replace(request, source_joints=style.own_joints)
        plain.append(request)
        edited.append(dataclasses.replace(request, edit=Edit(reference.photo, mask, "pasted")))
    enable_compilation_cache()
    pipeline = Pipeline.of_run(run)
    made = [pipeline.batch(requests, steps=flags.steps, guidance=flags.guidance) for requests in (plain, edited)]
    regions = [np.where(r.edit.mask[..., None], r.edit.reference, r.edit.reference // 4) for r in edited]
    columns = {
        "style": [style.photo for style, _ in rows],
        "reference": [reference.photo for _, reference in rows],
        "region": regions,
        "style posed": made[0],
        "transfer": made[1],
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet(columns, blocks=2 if flags.count > 3 else 1)).save(out, optimize=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error})") from error
    print(f"{out}: {flags.count} transfers", flush=True)
