"""Trained models as folders and as repositories of the Hugging Face hub: fetched, saved, pushed. Never a pickle."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tempfile
from typing import TYPE_CHECKING

import jax
from jax.sharding import SingleDeviceSharding

from input_pipeline.schema import InputError
from truepose_jax.config import Config, FirstStageModel
from truepose_jax.data.datasets import about_records
from truepose_jax.inference.exported import Converted, Exported
from truepose_jax.pretrained.conversion import animate_anyone, lora, paper_files, weights_folder
from truepose_jax.pretrained.conversion.export import write_export
from truepose_jax.pretrained.conversion.first_stage import write_first_stage
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError
from truepose_jax.pretrained.frozen_networks import folder_of, load_autoencoder
from truepose_jax.runtime.bundled import find_model
from truepose_jax.training.checkpoint import read_metadata

if TYPE_CHECKING:
    from truepose_jax.inference.pipeline import Run

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors", "README.md")
"""Of a repository: nothing else is fetched, copied or pushed."""


def fetch(name: str | os.PathLike[str], revision: str | None = None) -> str:
    """The folder of a model: `name` itself, that of the model that comes along under it, or a copy of a repository OWNER/NAME
    of the hub, kept where huggingface_hub keeps its own. revision: its branch, tag or commit. Raises InputError."""
    found = find_model(name)
    if os.path.exists(found):
        if revision is not None:
            raise InputError(f"{name} is a folder here; a revision is of a repository on the hub")
        return found
    if not HUB_NAME.fullmatch(found):
        raise InputError(f"{name}: no such folder, nor a name on the hub such as OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        folder = pathlib.Path(snapshot_download(found, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # whatever the network brings; none of it is a bug here
        raise InputError(f"{name}: no such folder, and not to be had from the hub ({_short(error)})") from error
    if not Exported.is_one(folder):
        raise InputError(f"{name}: is no model that save_pretrained or `convert to-torch` wrote")
    return str(folder)


def save(run: Run, folder: str | os.PathLike[str], *, dtype: str | None = None, with_clip: bool | None = None) -> str:
    """Writes the folder, new or empty, which diffusers and this program open; one line about it. Adapters are added. with_clip:
    copies the run's CLIP into it; None: where it has one of its own. dtype: as of write_export. An export is copied as it is.

    Raises CheckpointError and ConversionError before anything is written.
    """
    folder = pathlib.Path(folder)
    weights_folder.check_destination(folder, 0)
    if isinstance(run.checkpoints, Exported):
        if dtype is not None or with_clip is False:
            raise ConversionError(f"{run.workdir} is an export and is copied as it is; dtype and with_clip are a run's")
        _copy(run.checkpoints.folder, folder)
        return f"{folder}: a copy of {run.workdir}"
    if isinstance(run.checkpoints, Converted):
        raise ConversionError(
            f"{run.workdir} is a weights folder, which no run made; convert made it of what it would become"
        )
    model = run.config.model
    if model.method != "truepose" or animate_anyone.is_one(model):
        if with_clip:
            raise ConversionError(
                "--with-clip: this network's files are their authors', and CLIP is in them or beside them"
            )
        params = run.params(_host())
        if model.method == "truepose":
            return animate_anyone.write(folder, params, dtype)
        if model.method in paper_files.FORMS:
            return paper_files.write(folder, params, config=run.config, dtype=dtype)
        if not isinstance(model, FirstStageModel):
            raise ConversionError(f"{run.workdir}: there is no form to write a model of method {model.method!r} in")
        about = {"step": run.step, "weights": run.weights}
        return write_first_stage(folder, params, model=model, run=about, dtype=dtype)
    metadata, clip = read_metadata(run.workdir), run.config.model.clip.path
    if with_clip and not clip:
        raise ConversionError(
            "--with-clip: this run's CLIP is an untrained one, made from its seed wherever it is needed"
        )
    codec = _codec_file(run.config, metadata.get("frozen", {}).get("autoencoder"))
    inside = folder_of(clip, "clip") if clip and with_clip is not False else None
    params = run.params(_host())
    about = {"step": run.step, "weights": run.weights, "frozen": metadata.get("frozen", {})}
    about["records"] = about_records(run.config)
    origin = metadata.get("origin")
    return str(
        write_export(folder, params, config=run.config, dtype=dtype, origin=origin, run=about, clip=inside, codec=codec)
    )


def save_adapters(run: Run, folder: str | os.PathLike[str], *, dtype: str | None = None) -> str:
    """Writes the adapters that the run trains as diffusers reads them, and says so. Raises as `save`."""
    optim = run.config.optim.lora
    adapters = run.unmerged(_host())["lora"]
    return lora.write(pathlib.Path(folder), adapters, method=run.config.model.method, config=optim, dtype=dtype)


def _host() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def push(
    run: Run, repo: str, *, private: bool | None = None, token: str | None = None, message: str | None = None
) -> str:
    """Saves the run and uploads it to the repository OWNER/NAME of the hub, which is made where it is missing; the commit's
    address. token: None: what `hf auth login` left. Raises InputError, CheckpointError and ConversionError."""
    if not HUB_NAME.fullmatch(repo):
        raise InputError(f"{repo}: a repository of the hub is named OWNER/NAME")
    from huggingface_hub import HfApi, ModelCard

    with tempfile.TemporaryDirectory(prefix="truepose_push_") as place:
        folder = pathlib.Path(place) / "model"
        said = save(run, folder)
        if not (folder / "README.md").is_file():
            raise ConversionError(f"{said}: without a model card; only TruePose's own form is pushed")
        card = ModelCard.load(folder / "README.md")
        card.data.pipeline_tag = "image-to-image"
        card.save(folder / "README.md")
        hub = HfApi(token=token)
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            message = message or f"Step {run.step}, {run.weights} weights"
            commit = hub.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=list(FILES)
            )
        except Exception as error:  # whatever the network brings
            raise InputError(f"{repo}: cannot be pushed to the hub ({_short(error)})") from error
    return commit.commit_url


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _copy(source: pathlib.Path, folder: pathlib.Path) -> None:
    files = sorted({path for pattern in FILES for path in source.rglob(pattern)})
    with weights_folder.new_folder(folder, sum(path.stat().st_size for path in files)) as partial:
        for path in files:
            place = partial / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _codec_file(config: Config, recorded: str | None) -> pathlib.Path | None:
    """The run's own patch codec; None where it uses the one that comes along, or none. Raises ConfigError and
    ConversionError."""
    if config.model.autoencoder != "patches" or not config.model.vae:
        return None
    found = load_autoencoder(config.model)[2]
    if recorded not in (None, found):
        raise ConversionError(
            f"config.model.vae={config.model.vae} is not the patch codec that this run was trained with (fingerprint {found}, "
            f"then {recorded}); put that file there again"
        )
    return pathlib.Path(config.model.vae)
