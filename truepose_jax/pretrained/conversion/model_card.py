"""The README.md of an export: what the weights are, where they come from, under which licence, how to load them."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from typing import Any

from truepose_jax.config import Config, TruePoseModel, to_dict
from truepose_jax.pretrained.conversion.export_configs import EXCHANGED, labels_of
from truepose_jax.pretrained.conversion.origins import UNKNOWN_LICENCE
from truepose_jax.pretrained.conversion.weights_folder import CLIP_FOLDER, CODEC_FILE
from truepose_jax.runtime.choices import SAMPLERS

OWN_LICENCE = "apache-2.0"
"""Of a model that was trained from nothing: this program's."""

_OPTIMIZERS = {"adamw": "AdamW", "lamb": "LAMB"}
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_REPOSITORY = re.compile(r"[\w.\-]+/[\w.\-]+")


def model_card(
    config: Config, origin: Mapping[str, Any] | None, run: Mapping[str, Any], *, copied: Container[str] = ()
) -> str:
    """Markdown with YAML front matter. origin, run: as of export.write_export. copied: files of frozen networks that the
    folder holds."""
    return "\n".join([*_front_matter(origin), *_text(config, origin, run, copied)]) + "\n"


def _front_matter(origin: Mapping[str, Any] | None) -> list[str]:
    licence = OWN_LICENCE if origin is None else _licence(origin)
    lines = ["---", "library_name: diffusers"]
    if licence == UNKNOWN_LICENCE:
        lines.append("license: unknown")
    elif _LICENCE_ID.fullmatch(licence):
        lines.append(f"license: {licence}")
    else:  # the hub knows only short names
        lines += ["license: other", f"license_name: {re.sub(r'[^a-z0-9.]+', '-', licence.lower()).strip('-')}"]
    if origin is not None and _REPOSITORY.fullmatch(origin["name"]):
        lines.append(f"base_model: {origin['name']}")
    return [*lines, "tags:", "- pose-guided-person-image-synthesis", "- image-to-image", "- truepose", "- jax", "---"]


def _licence(origin: Mapping[str, Any]) -> str:
    return origin.get("licence") or UNKNOWN_LICENCE


def _frozen(name: str, fingerprint: str) -> str:
    """A line on one of the networks that are not here."""
    if fingerprint.startswith("pixels-"):
        return f"- {name}: none; pixels are rearranged (`{fingerprint}`)"
    if fingerprint.startswith("patches-"):
        return f"- {name}: principal components of patches, a file of truepose_jax (`{fingerprint}`)"
    if fingerprint.startswith("untrained-"):
        return f"- {name}: a small one with random weights, which truepose_jax makes from its seed (`{fingerprint}`)"
    return f"- {name}: fingerprint `{fingerprint}`"


_TWIN = (
    "The whole model in PyTorch (`truepose_jax/interop/torch_truepose.py` of truepose_jax):",
    "",
    "```python",
    "from truepose_jax.interop.torch_truepose import TruePose",
    "",
    "model = TruePose.from_pretrained(folder)",
    "```",
)
_NO_TWIN = (
    "Only truepose_jax runs the whole of it: `interop/torch_truepose.py` has no half-cell head and refuses the folder. The same "
    "holds for ablations.",
)


def _ours(model: TruePoseModel) -> list[str]:
    """What of the network is not the paper's."""
    fusion = model.fusion
    used = {
        "HPFA's softmax also carries the source's latents": fusion.carry_latents,
        "cosine logits": fusion.cosine,
        "keys and values from H' + F'": fusion.residual,
        "limb coordinates and a half-cell head (`carry_source`, `carry_target`), which needs the source's pose": model.carry.head,
        "the source moved limb by limb, which that head mixes in": model.carry.limb_warp,
    }
    used |= {f"an ablation or another reading, {name} {getattr(fusion, name)}": not fusion.is_whole for name in EXCHANGED}
    found = "; ".join(what for what, on in used.items() if on)
    return [f"- Not the paper's but truepose_jax's: {found}."] if found else []


def _text(
    config: Config, origin: Mapping[str, Any] | None, run: Mapping[str, Any], copied: Container[str]
) -> list[str]:
    model, data = config.model, config.data
    h, w = model.size
    kind = {"ema": "the parameters' exponential moving average", "raw": "the parameters"}[run["weights"]]
    records = run.get("records", {}).get("name")
    dataset = {
        "synthetic": "synthetic people",
        "folder": "a folder of photos",
        "records": f"records of `{records}`" if records else "records (`prepare build`)",
    }[data.dataset]
    labels = labels_of(config, run) or "as the records say that it was trained on; they were not at hand for this card"
    recorded = sorted(dict(run.get("frozen") or {}).items())
    here = {"clip": f"{CLIP_FOLDER}/config.json" in copied, "autoencoder": CODEC_FILE in copied}
    frozen = [_frozen(name, found) for name, found in recorded if not here.get(name)]
    inside = ["", f"CLIP's vision tower, frozen in training, is in `{CLIP_FOLDER}/`."] if here["clip"] else []
    if here["autoencoder"]:
        inside += ["", f"The patch codec, the autoencoder of this model, is `{CODEC_FILE}`."]
    if origin is None:
        start = [
            f"Trained from nothing: no other model's weights are in it. Licence: {OWN_LICENCE}, as the program that "
            "trained it.",
        ]
    else:
        start = [
            f"Training started from `{origin['name']}`, whose licence is `{_licence(origin)}`; its terms hold for these "
            "weights.",
        ]
        if "clip" in origin:
            start += ["", f"CLIP came from `{origin['clip']['name']}`, whose licence is `{_licence(origin['clip'])}`."]
        if origin.get("files"):
            start += ["", "The files that were read (sha256):", ""]
            start += [f"- {file}: `{digest}`" for file, digest in sorted(origin["files"].items())]
    return [
        "",
        f"# TruePose, {h}x{w}",
        "",
        "Draws the person of a source photo in a target pose. Two UNets of Stable Diffusion's kind: SourceNet reads the "
        "source photo, TargetNet denoises, and its blocks read SourceNet through HPFA (human-parsing-guided fusion "
        f"attention) and {model.fusion.regions} regions of the source as CLIP sees them through CAA. Trained with "
        "truepose_jax.",
        "",
        f"- Weights: {kind} at step {run['step']:,} (`{run['weights']}`).",
        f"- Training: {dataset}, {h}x{w} pixels, batch {config.batch_size}, {_OPTIMIZERS[config.optim.name]} at "
        f"{config.optim.learning_rate:g}, {config.optim.schedule} rate, dropping the source of "
        f"{config.diffusion.drop_rate:.0%} of the samples.",
        f"- Sampling it was set up for: {SAMPLERS[config.diffusion.sampler]}, {config.diffusion.steps} steps, "
        f"{config.diffusion.spacing} spacing, "
        f"guidance {config.diffusion.guidance:g}; the network predicts {config.diffusion.schedule.prediction}.",
        f"- Parsing labels: {labels}.",
        *_ours(model),
        "",
        "## Where it comes from",
        "",
        *start,
        *inside,
        "",
        "Not in this folder, and needed to run it; with other ones the pictures differ. A fingerprint is of the tensors "
        "(names, shapes, bits; truepose_jax/pretrained/frozen_networks.py), not of a file: no hub lists it.",
        "",
        *(frozen or ["- none recorded"]),
        "",
        "## Loading",
        "",
        "With truepose_jax the folder serves as a run: `python -m truepose_jax.generate --workdir=FOLDER ...`. With diffusers:",
        "",
        "```python",
        "from diffusers import DDIMScheduler, UNet2DConditionModel",
        "",
        'source_net = UNet2DConditionModel.from_pretrained(folder, subfolder="source_net")',
        'target_net = UNet2DConditionModel.from_pretrained(folder, subfolder="target_net")  # attn2 is CAA',
        'scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")',
        "```",
        "",
        "HPFA, the pose encoder and, where there are some, the parsing encoder and the half-cell head are in "
        "`truepose.safetensors`; `truepose.json` says how they are wired.",
        "",
        *(_TWIN if model.fusion.is_whole and not model.carry.head else _NO_TWIN),
        "",
        "## Training configuration",
        "",
        "Also in `training_config.json`.",
        "",
        "```json",
        json.dumps(to_dict(config), indent=1),
        "```",
    ]
