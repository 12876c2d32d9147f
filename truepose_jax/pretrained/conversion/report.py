"""What a conversion prints: the table of a dry run, and the report at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from truepose_jax.pretrained.conversion.plan import CheckedPlan, Item
from truepose_jax.pretrained.conversion.weights_folder import CLIP_FOLDER, DINO_FOLDER, PARAMS_FILE, gib

NEXT = {
    "truepose": ("truepose_deepfashion_256", {"vae": "vae", CLIP_FOLDER: "clip.path"}),
    "fpdm": ("fpdm_deepfashion_512", {"vae": "vae", DINO_FOLDER: "dino.path", CLIP_FOLDER: "ipf.path"}),
    "imagpose": ("imagpose_deepfashion_512", {"vae": "vae", DINO_FOLDER: "dino.path"}),
}
"""Of each method: its configuration, and the frozen networks that training needs, {folder: setting}."""


def table(checked: CheckedPlan) -> Iterator[str]:
    """A line per tensor: name, shape, dtype, and where it comes from."""
    for file, items in checked.plan.items.items():
        names = max(len(item.name) for item in items)
        shapes = max(len(_shape(item)) for item in items)
        yield file
        for item in items:
            origin = f"<- {checked.name_in_source(item)}" if item.tensor else "zeros"
            yield f"  {item.name:<{names}}  {_shape(item):<{shapes}}  {checked.dtype(item)!s:<8}  {origin}"


def _shape(item: Item) -> str:
    return "x".join(map(str, item.shape))


def summary(checked: CheckedPlan) -> Iterator[str]:
    """Per network tensors, parameters and bytes; then what begins random and what is left out."""
    details = checked.plan.details
    origin = details["origin"]
    yield f"from {origin['name']}, licence {origin['licence']}"
    if "clip" in origin:
        yield f"and {origin['clip']['name']}, licence {origin['clip']['licence']}"
    for network, items in _networks(checked).items():
        count = sum(math.prod(item.shape) for item in items)
        size = sum(checked.dtype(item).itemsize * math.prod(item.shape) for item in items)
        dtypes = ", ".join(sorted({str(checked.dtype(item)) for item in items}))
        yield f"  {network:<16}{len(items):>6,} tensors {count:>15,} parameters {gib(size):>12}  {dtypes}"
    for network in details["fresh"]:
        yield f"  {network:<16}     no weights: begins random"
    if schedule := details["schedule"]:
        yield (
            f"noise schedule: {schedule['betas']} from {schedule['beta_start']} to {schedule['beta_end']} in "
            f"{schedule['steps']} steps, predicts {schedule['prediction']}"
        )
    for reason, count in checked.left_out.items():
        yield f"left out: {count:,} tensors: {reason}"
    for prefix, count in checked.wrapped.items():
        yield f"read without '{prefix}' before their names: {count:,} tensors"
    yield from checked.plan.notes


def _networks(checked: CheckedPlan) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for file, items in checked.plan.items.items():
        for item in items:
            network = item.name.split("/", 1)[0] if file == PARAMS_FILE else file.split("/", 1)[0]
            found.setdefault(network, []).append(item)
    return found


def closing(checked: CheckedPlan, dst: Path, *, peak: int) -> Iterator[str]:
    """The last lines. peak: bytes of memory that the process reached."""
    if bad := checked.not_finite:
        yield f"warning: {len(bad):,} tensors hold NaN or infinity, such as {bad[0]}: the weights are of no use as they are"
    size = checked.bytes
    share = f", {peak / size:.2f} of that" if size >= 2**30 else ""  # below, the program itself is most of it
    yield f"wrote {gib(size)} to {dst}; peak memory {gib(peak)}{share}"
    config, wanted = NEXT[checked.plan.details["method"]]
    lacks = [
        f"--config.model.{setting}=DIR"
        for folder, setting in wanted.items()
        if not any(file.startswith(f"{folder}/") for file in checked.plan.items)
    ]
    yield f"next: python -m truepose_jax.train --config=configs/{config}.py --workdir=DIR \\"
    yield f"    {' '.join([f'--config.init_from={dst}', *lacks])}"
