"""Pictures from Python: load a run, pass arrays, get arrays.

    pipe = Pipeline.load("runs/demo")                                  # or what `convert to-torch` wrote
    picture = pipe(photo, pose=other_photo, seed=0)                    # both found by what comes along ([pose] extra)
    picture = pipe(photo, parsing, joints, labels="atr18", seed=0)     # uint8 [h w 3]
    edited = pipe(photo, parsing, joints_of_reference, edit=Edit(reference, mask))     # style transfer, inpainting.py
    picture = pipe(photo, parsing, joints, source_joints=joints_of_photo)              # a model with the half-cell head

A photo of any size is fitted to the model's (stretched under 2 %, else padded with white) and the padding is
taken off the result. The pose's frame is fitted into the part that is photo, so no joint falls into the padding.
Noise is keyed by (seed, name): neither the batch nor its order changes a picture.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from input_pipeline.batches.transforms import write_picture, write_source, write_target, write_views
from input_pipeline.fields import Layout
from input_pipeline.schema import InputError
from input_pipeline.skeletons import DRAWINGS
from truepose_jax.config import Config, ConfigError
from truepose_jax.data.datasets import about_records
from truepose_jax.inference import hub
from truepose_jax.inference.canvas import FittedCanvas, Pose, Source, fit_canvas
from truepose_jax.inference.exported import Converted, Exported
from truepose_jax.inference.photo_requests import AUTO, PhotoOptions, resolve
from truepose_jax.inference.request import SEEDS, Fitted, Request, fit_request
from truepose_jax.kernels.attention.api import cannot_run
from truepose_jax.methods import Denoiser, Needs, needs
from truepose_jax.methods.base import Params
from truepose_jax.pretrained.factory import assemble
from truepose_jax.pretrained.frozen_networks import KINDS
from truepose_jax.pretrained.region_tokens import RegionEncoder, make_encoder
from truepose_jax.runtime import rng
from truepose_jax.runtime.bundled import find_model
from truepose_jax.runtime.choices import DTYPES, SAMPLERS, WEIGHTS
from truepose_jax.runtime.sharding import batch_parts, make_mesh, put_whole_batch, replicate
from truepose_jax.sampling.image_grid import to_uint8
from truepose_jax.sampling.inpainting import MASK_FIELD, Edit, EditSampler
from truepose_jax.sampling.sampler import Progress, Sampler, Sampling, cast_kernels, compiler_options
from truepose_jax.training import lora
from truepose_jax.training.checkpoint import CheckpointError, Checkpoints, read_config, read_metadata
from truepose_jax.training.optim import put_trained
from truepose_jax.training.validation import of_pairs


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir, or an export, opened for reading, and which of its weights are meant; nothing large is read yet.

    weights: "ema" or "raw". checkpoints: None of weights that no run made.
    """

    workdir: str
    config: Config
    checkpoints: Checkpoints | Exported | Converted | None
    step: int
    weights: str

    @classmethod
    def open(cls, workdir: str | os.PathLike[str], *, weights: str | None = None, step: int | None = None) -> Run:
        """workdir: of a run, an export, or the name of a model that comes along. weights None: the EMA where the run keeps
        one. step None: the last checkpoint. Of an export: those that it holds.

        Raises CheckpointError where there is no run or no checkpoint, or not those weights.
        """
        if weights not in (None, *WEIGHTS):
            raise ConfigError(f"weights is {weights!r}; choose one of {tuple(WEIGHTS)}")
        workdir = find_model(workdir)
        if Exported.is_one(pathlib.Path(workdir)):
            export = Exported.open(pathlib.Path(workdir))
            if (weights or export.weights, export.step if step is None else step) != (export.weights, export.step):
                raise CheckpointError(
                    f"{workdir} holds the {export.weights} weights of step {export.step} and no others"
                )
            return cls(os.fspath(workdir), export.config, export, export.step, export.weights)
        if Converted.is_one(pathlib.Path(workdir)):
            found = Converted.open(pathlib.Path(workdir))
            if (weights or "raw", step or 0) != ("raw", 0):
                raise CheckpointError(f"{workdir} holds one set of weights that no run made: neither ema nor steps")
            return cls(os.fspath(workdir), found.config, found, 0, "raw")
        config = read_config(workdir)
        if weights == "ema" and not config.optim.ema_decay:
            raise CheckpointError(f"{workdir} keeps no EMA (config.optim.ema_decay is 0); take the raw weights")
        checkpoints = Checkpoints(workdir, keep=1, every=1, read_only=True)
        latest = checkpoints.latest_step()
        if latest is None:
            raise CheckpointError(f"{checkpoints.folder} holds no checkpoint yet; train first, or wait for one")
        if step is not None and not (checkpoints.folder / str(step)).is_dir():
            raise CheckpointError(f"{checkpoints.folder} holds no step {step}; its last is {latest}")
        weights = weights or ("ema" if config.optim.ema_decay else "raw")
        return cls(os.fspath(workdir), config, checkpoints, latest if step is None else step, weights)

    @functools.cached_property
    def labels(self) -> str:
        """The label set that it was trained on; "" where that is not known (records that are gone)."""
        if isinstance(self.checkpoints, Exported | Converted):
            return self.checkpoints.labels
        return self.config.data.labels or about_records(self.config).get("labels", "")

    def fit(self, request: Request) -> Fitted:
        """The request as this run's model takes it. Raises InputError."""
        size, wanted = self.config.model.size, self.needs
        if not wanted.tokens:
            joints = DRAWINGS[wanted.drawing].joints
            return fit_request(request, size, source_pose=wanted.source_pose, mapped=False, joint_count=joints)
        if not wanted.source_pose:
            return fit_request(request, size)
        return fit_request(request, size, head=True, labels=self.labels)

    @property
    def needs(self) -> Needs:
        """What its method reads."""
        return needs(self.config)

    @property
    def frozen(self) -> Mapping[str, str]:
        """Fingerprints of the frozen networks that it was trained with, where they are known."""
        if isinstance(self.checkpoints, Exported | Converted):
            return self.checkpoints.frozen
        return read_metadata(self.workdir).get("frozen", {})

    def params(self, place: Sharding | None = None) -> Params:
        """The weights that are meant, whole: adapters are added to the matrices that they adapt."""
        return lora.merged(self.unmerged(place), self.config.optim.lora)

    def unmerged(self, place: Sharding | None = None) -> Params:
        """The same with adapters beside the networks, where the run trains any."""
        part = WEIGHTS[self.weights]
        read = functools.partial(self.checkpoints.restore_part, step=self.step, place=place)
        found = read(part)
        return put_trained(read("params"), found) if lora.LORA in found and part == "ema" else found

    def sampling(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Sampling:
        """With the run's own in place of None. Raises InputError where they are out of range."""
        diffusion = self.config.diffusion
        steps = diffusion.steps if steps is None else steps
        guidance = diffusion.guidance if guidance is None else guidance
        if not 1 <= steps <= diffusion.schedule.steps:
            raise InputError(f"steps is {steps}; it must be from 1 to {diffusion.schedule.steps}")
        if not (math.isfinite(guidance) and guidance >= 0):
            raise InputError(
                f"guidance is {guidance}; it must be 0 or more (1: none, the run's: {diffusion.guidance:g})"
            )
        sampler = diffusion.sampler if sampler is None else sampler
        if sampler not in SAMPLERS:
            raise InputError(f"sampler is {sampler!r}; choose one of {tuple(SAMPLERS)}")
        if diffusion.schedule.zero_snr and sampler not in ("ddim", "ddpm"):
            raise InputError(f"sampler is {sampler!r}, whose time is log SNR; this run's noise begins at 0: take ddim or ddpm")
        low, high = diffusion.guidance_interval if guidance_interval is None else guidance_interval
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"guidance_interval is {low:g} to {high:g}; both are shares of the schedule, from 0 to 1, low first"
            )
        return Sampling(steps, guidance, sampler, (low, high))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A run's weights on all local devices, ready to make pictures. `run` tells which weights they are."""

    run: Run
    method: Denoiser
    params: Any
    frozen: Mapping[str, Any]
    encoder: RegionEncoder | None
    mesh: Mesh
    _samplers: dict[tuple[Sampling, type[Sampler]], Sampler] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(
        cls,
        workdir: str | os.PathLike[str],
        *,
        weights: str | None = None,
        step: int | None = None,
        vae: str | None = None,
        clip: str | None = None,
        dtype: str | None = None,
    ) -> Pipeline:
        """Restores the parameters alone; the run may still be training. See `Run.open` for weights and step.

        vae, clip: folders that override the config's (vae: the file of a patch codec). dtype: what the networks compute in,
        in place of the config's. Raises CheckpointError and ConfigError.
        """
        return cls.of_run(Run.open(workdir, weights=weights, step=step), vae=vae, clip=clip, dtype=dtype)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> Pipeline:
        """A folder, the name of a model that comes along, or a repository OWNER/NAME of the Hugging Face hub. options: of
        `load`. Raises InputError where it is not to be had, and as `load`."""
        return cls.load(hub.fetch(name, revision), **options)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: str | None = None) -> None:
        """Writes a folder, new or empty, that from_pretrained and diffusers open, as `convert to-torch` does: the weights as
        the run has them, or in dtype (float32, float16, bfloat16). Raises ConversionError."""
        hub.save(self.run, folder, dtype=dtype)

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what save_pretrained writes, with its model card, to the repository OWNER/NAME of the hub, which is made
        where it is missing; the commit's address. Raises InputError and ConversionError."""
        return hub.push(self.run, repo, private=private, token=token)

    @classmethod
    def of_run(cls, run: Run, *, vae: str | None = None, clip: str | None = None, dtype: str | None = None) -> Pipeline:
        """The same of a run that is open. Raises CheckpointError and ConfigError."""
        config, model = run.config, run.config.model
        if dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype is {dtype!r}; choose one of {DTYPES}")
        if "target_pose" not in run.needs.sample and run.needs.draw == "pairs":
            raise ConfigError(f"{run.workdir} is of config.model.method {model.method!r}, which makes no pictures")
        if vae and model.autoencoder == "pixels":
            raise ConfigError(f"{run.workdir} uses the {model.autoencoder!r} codec; a VAE does not apply to it")
        given = {name: folder for name, folder in (("vae", vae), ("clip", clip)) if folder}
        for name in sorted(given.keys() - model.folders.keys()):
            raise ConfigError(
                f"--{name}={given[name]}: the method of {run.workdir}, {model.method}, has no such network"
            )
        model = dataclasses.replace(model.located(given, anew=True), dtype=dtype or model.dtype)
        if reason := cannot_run(model.attention):
            logging.warning("config.model.attention: %s; auto is taken", reason)
            model = dataclasses.replace(model, attention="auto")
        encoder = make_encoder(model.clip, config.token_width) if needs(config).tokens else None
        method, frozen, _, prints = assemble(dataclasses.replace(config, model=model), encoder)
        recorded = run.frozen
        _check_frozen("vae", recorded.get("autoencoder"), prints.get("autoencoder"), folder=model.vae, override=vae)
        for role in ("dino", "ipf"):
            if role in prints:
                _check_frozen(role, recorded.get(role), prints[role], folder=model.folders[role], override=None)
        if encoder is not None:
            _check_frozen("clip", recorded.get("clip"), encoder.fingerprint, folder=model.clip.path, override=clip)
        mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.local_devices())
        place = NamedSharding(mesh, PartitionSpec())
        params = cast_kernels(run.params(place), model.dtype)
        return cls(run, method, params, replicate(mesh, frozen), encoder, mesh)

    def __call__(
        self,
        source: np.ndarray,
        parsing: np.ndarray | str | None = AUTO,
        pose: np.ndarray | None = None,
        *,
        labels: str = "atr18",
        frame_hw: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = 0,
        name: str = "",
        edit: Edit | None = None,
        source_joints: np.ndarray | None = None,
        source_frame_hw: tuple[int, int] | None = None,
        callback: Progress | None = None,
        num: int | None = None,
        options: PhotoOptions = PhotoOptions(),
    ) -> np.ndarray | list[np.ndarray]:
        """One picture, uint8 [h w 3]; with num a list of so many, of `seed` and those that follow it. pose: joints [18 3], or
        another photo, uint8 [h w 3]. parsing "auto": the person is found in `source`, which needs the [pose] extra; what is
        found, and how it is cut out and put back, options say. See `Request` for the other arguments of one picture and `sample`
        for the rest. Raises InputError."""
        if pose is None:
            raise InputError("pose is missing: give joints [18 3], or a photo of somebody in the pose")
        if num is not None and not 1 <= num <= SEEDS - seed:
            raise InputError(f"num is {num}; it must be 1 or more, and seeds end at {SEEDS - 1}")
        if not self.run.needs.tokens and isinstance(parsing, str):
            parsing = None
        request = Request(source, pose, parsing, labels, frame_hw, name, seed, edit, source_joints, source_frame_hw)
        model, sampling = self.run.config.model, self.run.sampling(steps, guidance, sampler, guidance_interval)
        request = resolve(request, model.size, head=self.run.needs.source_pose, options=options).request
        fitted = self.run.fit(request)
        every = [dataclasses.replace(fitted, seed=seed + i) for i in range(num or 1)]
        pictures = self.sample(every, sampling=sampling, callback=callback)
        finished = [fitted.finish(picture) for picture in pictures]
        return finished[0] if num is None else finished

    def batch(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        batch_size: int | None = None,
    ) -> list[np.ndarray]:
        """A picture for each request, put back into its photo where the source is cut out of one. Raises InputError for the
        first bad one, before any is made."""
        fitted = [self.run.fit(request) for request in requests]
        pictures = self.sample(fitted, sampling=self.run.sampling(steps, guidance, sampler), batch_size=batch_size)
        return [one.finish(picture) for one, picture in zip(fitted, pictures, strict=True)]

    def sample(
        self,
        fitted: Sequence[Fitted],
        *,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        callback: Progress | None = None,
    ) -> list[np.ndarray]:
        """uint8 [h w 3] for each: of the model's size, less the padding, so of the photo's aspect ratio.

        batch_size None: all at once. Every batch is filled up to it, so that one program serves all of them; there
        is one program per batch size and way of sampling, and another for edits. sampling: of `run.sampling`; None: the run's.
        callback(done, steps) hears of the steps of all batches, about ten times a second at most; what it raises ends the
        sampling. With it the pictures come from other programs, of the same numbers. Raises CheckpointError where the weights
        give values that are not finite.
        """
        kind = EditSampler if any(f.edit for f in fitted) else Sampler
        size = batch_size or max(len(fitted), 1)
        found = []
        starts = range(0, len(fitted), size)
        for i, start in enumerate(starts):
            piece = fitted[start : start + size]
            batch, keys = self.batch_of(piece, size)
            if kind is EditSampler:
                batch[MASK_FIELD] = _edit_masks(piece, batch["target"].shape[:3])
            images = self._sampled(kind, sampling, batch, keys, _of_all(callback, i, len(starts)))
            for f, image in zip(piece, to_uint8(of_pairs(images, self.run.needs)), strict=False):
                found.append(f.framing.crop(image if f.edit is None else f.edit.finish(image)))
        return found

    def _sampled(
        self,
        kind: type[Sampler],
        sampling: Sampling | None,
        batch: Mapping[str, np.ndarray],
        keys: jax.Array,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """What one batch gives, in [-1, 1]. Raises CheckpointError."""
        sampling, diffusion = sampling or self.run.sampling(), self.run.config.diffusion
        sampler = self._samplers.setdefault(
            (sampling, kind), kind(self.method, diffusion.schedule, diffusion.spacing, sampling)
        )
        with jax.set_mesh(self.mesh):
            inputs = self.params, self.frozen, put_whole_batch(self.mesh, batch), keys
            images = np.asarray(sampler(*inputs, progress=progress))
        if not np.isfinite(images).all():
            raise CheckpointError(
                f"{self.run.workdir}, step {self.run.step}: the {self.run.weights} weights give values that are "
                "not finite; try another step or other weights"
            )
        return images

    def canvas(
        self,
        sources: Sequence[Source],
        poses: Sequence[Pose],
        *,
        fill: str = "pose",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        name: str = "",
    ) -> list[np.ndarray]:
        """One picture for each pose of the person whom all sources show, uint8 [h w 3], framed as the first source's; of methods
        that make canvases (IMAGPose). See fit_canvas. Raises InputError."""
        fitted = fit_canvas(sources, poses, self.run, fill=fill, seed=seed, name=name)
        return self.sample_canvases([fitted], sampling=self.run.sampling(steps, guidance))[0]

    def sample_canvases(
        self, fitted: Sequence[FittedCanvas], *, sampling: Sampling | None = None, batch_size: int | None = None
    ) -> list[list[np.ndarray]]:
        """The same of each canvas that is fitted, in batches as `sample` has them."""
        wanted, hw = self.run.needs, self.run.config.model.size
        size, parts, found = batch_size or max(len(fitted), 1), batch_parts(self.mesh), []
        for start in range(0, len(fitted), size):
            piece = fitted[start : start + size]
            layout = Layout(wanted.sample, "float32", wanted.letters, wanted.drawing)
            batch = layout.empty(batch_size=len(piece), targets_per_source=1, size=hw)
            for row, one in enumerate(piece):
                write_views(batch, row, one.tiles, shown=one.given, hw=hw, drawing=wanted.drawing)
            batch["valid"][:] = 1
            order = np.minimum(np.arange(-(-size // parts) * parts), len(piece) - 1)
            keys = jnp.stack([rng.key_of_name(jax.random.key(one.seed), one.name) for one in piece])
            images = self._sampled(
                Sampler, sampling, {name: array[order] for name, array in batch.items()}, keys[order]
            )
            for one, tiles in zip(piece, images, strict=False):
                found.append([one.framing.crop(image) for image in to_uint8(tiles[list(one.wanted)])])
        return found

    def carried(self, fitted: Sequence[Fitted], pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The sources as the method's attention carried them, uint8 [h w 3] as the pictures, which `sample` made of requests
        without an edit. Only where method.carries."""
        batch, _ = self.batch_of(fitted, len(fitted))
        batch["target"][:] = 1.0  # the padding is white
        for row, (f, picture) in enumerate(zip(fitted, pictures, strict=True)):
            write_picture(picture, out=f.framing.crop(batch["target"][row]))
        images = to_uint8(self.carried_of(batch))
        return [f.framing.crop(image) for f, image in zip(fitted, images, strict=False)]

    def carried_of(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Denoiser.carried of a host batch whose targets are the samples, [b h w 3] in [-1, 1]. Only where method.carries."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._carried(self.params, self.frozen, put_whole_batch(self.mesh, batch)))

    @functools.cached_property
    def _carried(self):
        return jax.jit(self.method.carried, compiler_options=compiler_options())

    def batch_of(self, fitted: Sequence[Fitted], size: int) -> tuple[dict[str, np.ndarray], jax.Array]:
        """The batch that the method conditions on, and a key per row. Its `target` is black, or the reference of an edit.
        Rows beyond len(fitted), up to a multiple of the devices that holds `size`, repeat the last one."""
        config = self.run.config
        wanted, hw = needs(config), config.model.size
        layout = Layout((*wanted.sample, "target"), "float32", wanted.letters, wanted.drawing)
        batch = layout.empty(batch_size=len(fitted), targets_per_source=1, size=hw)
        for labels in {f.labels.name: f.labels for f in fitted}.values():
            rows = [row for row, f in enumerate(fitted) if f.labels is labels]
            tokens = [None] * len(rows)
            if self.encoder is not None:
                sources = [fitted[row].source for row in rows]
                tokens = list(zip(*self.encoder.tokens(sources, labels.name), strict=True))
            for i, row in enumerate(rows):
                source = fitted[row].source
                target = np.zeros_like(source.image) if fitted[row].edit is None else fitted[row].edit.reference
                unknown = dataclasses.replace(source, image=target, joints=fitted[row].joints)
                write_source(batch, row, source, tokens[i], hw=hw)
                write_target(batch, row, unknown, labels, hw=hw, drawing=wanted.drawing)
                if wanted.draw == "canvas":
                    write_views(batch, row, [source, unknown], shown=1, hw=hw, drawing=wanted.drawing)
        parts = batch_parts(self.mesh)
        order = np.minimum(np.arange(-(-size // parts) * parts), len(fitted) - 1)
        keys = jnp.stack([rng.key_of_name(jax.random.key(f.seed), f.name) for f in fitted])
        return {name: array[order] for name, array in batch.items()}, keys[order]


def _of_all(callback: Progress | None, batch: int, batches: int) -> Progress | None:
    """The callback of one batch that tells the steps of all of them."""
    return callback and (lambda done, steps: callback(batch * steps + done, batches * steps))


def _edit_masks(fitted: Sequence[Fitted], shape: tuple[int, int, int]) -> np.ndarray:
    """bool [b h w]: everywhere where a row edits nothing; rows beyond len(fitted) are of no account."""
    masks = np.ones(shape, bool)
    for row, f in enumerate(fitted):
        if f.edit is not None:
            masks[row] = f.edit.mask
    return masks


def _check_frozen(kind: str, recorded: str | None, found: str, *, folder: str, override: str | None) -> None:
    """Are these the frozen weights that the run was trained with? An override is believed, and says so."""
    if recorded in (None, found):
        return
    if override:
        logging.warning("--%s=%s: other weights than those the run was trained with", kind, override)
        return
    raise ConfigError(
        f"{KINDS[kind].setting}={folder!r} holds other weights than those this run was trained with (fingerprint "
        f"{found[:12]}, then {recorded[:12]}); name their folder by --{kind}=DIR"
    )
