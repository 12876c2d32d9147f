"""Every setting there is, with its type, its range and its default (the TruePose paper's value where it has one), as frozen
dataclasses; and the strict reader that makes them from a ConfigDict.

configs/ say what differs from the defaults. A key that is unknown, missing or of another type, and a value out of its
range, are a ConfigError that names it. Every float must be finite.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from input_pipeline.schema import MAX_CLASSES, UserError
from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.models.carry import CarryConfig
from truepose_jax.models.hpfa import FusionConfig
from truepose_jax.models.unet import UNetConfig


class ConfigError(UserError):
    """A configuration that cannot be run: one line that names the key, its value and what is allowed."""


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(f"config.{otherwise}")


# Ranges, in words and as a test; they stand in a field's type.
_ABOVE_0 = ("above 0", lambda x: x > 0)
_FROM_0 = ("0 or more", lambda x: x >= 0)
Positive = Annotated[int, _ABOVE_0]
PositiveFloat = Annotated[float, _ABOVE_0]
Count = Annotated[int, _FROM_0]
FloatFrom0 = Annotated[float, _FROM_0]
Several = Annotated[int, ("2 or more", lambda x: x >= 2)]
Share = Annotated[float, ("in [0, 1]", lambda x: 0 <= x <= 1)]
UpTo48 = Annotated[int, ("from 1 to 48", lambda x: 1 <= x <= 48)]
ShareBelow1 = Annotated[float, ("in [0, 1)", lambda x: 0 <= x < 1)]
AxisSize = Annotated[int, ("above 0, or -1 for the rest", lambda x: x > 0 or x == -1)]


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The region-token encoder. path: a transformers CLIP vision folder; "" makes a small seeded one, untrained, of
    the sizes that follow (and says so)."""

    path: str = ""
    image_size: Positive = 32
    patch_size: Positive = 8
    hidden_size: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    seed: Count = 0

    def __post_init__(self):
        fits = self.patch_size <= self.image_size and self.hidden_size % self.heads == 0
        _require(
            bool(self.path) or fits,
            f"model.clip has image_size {self.image_size} and patch_size {self.patch_size}, hidden_size "
            f"{self.hidden_size} and heads {self.heads}; a patch must fit into the image, heads must divide hidden_size",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """size: (height, width) in pixels. autoencoder "sd15": AutoencoderKL from the diffusers folder `vae`; "pixels":
    space-to-depth by `pixel_factor`, no weights; "patches": `patch_channels` principal components of 4x4 pixels, of the
    file `vae` or, where that is "", of the one that comes along (models/patch_codec.py). positions "sincos": fixed 2-D
    sinusoids after both networks' conv_in, for training from nothing (SD1.5's networks have learned places and take
    "none"). source_parsing "coverage": the source's parsing map is added there too, in SourceNet (not in the paper;
    "none"). dtype: compute dtype; parameters are float32. attention: the implementation that the method's attention takes
    (kernels/attention/api.py), "auto": what suits the device and the sizes, of those that have run on one of its kind."""

    method: Literal["truepose"] = "truepose"
    size: tuple[int, int] = (512, 352)
    autoencoder: Literal["sd15", "pixels", "patches"] = "sd15"
    vae: str = ""
    pixel_factor: Literal[2, 4, 8] = 8
    patch_channels: UpTo48 = 24
    unet: UNetConfig = UNetConfig(attention_head_dim=(8,) * 4)
    fusion: FusionConfig = FusionConfig()
    carry: CarryConfig = CarryConfig()
    positions: Literal["none", "sincos"] = "none"
    source_parsing: Literal["none", "coverage"] = "none"
    clip: ClipConfig = ClipConfig()
    remat: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "reference", "xla", "per_image", "pallas_tpu", "pallas_gpu", "cudnn"] = "auto"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell and side."""
        return self.pixel_factor if self.autoencoder == "pixels" else 8

    @property
    def latent_channels(self) -> int:
        return {"pixels": 3 * self.pixel_factor**2, "patches": 4 * self.patch_channels}.get(self.autoencoder, 4)

    @property
    def uses_clip(self) -> bool:
        """Whether the network itself looks through CLIP at the source (ablation B1), beside its region tokens."""
        return self.fusion.features == "clip"

    def __post_init__(self):
        factor, needed = self.latent_factor, self.latent_channels
        fits = all(side > 0 and side % factor == 0 for side in self.size)
        _require(fits, f"model.size is {self.size}; both sides must be above 0 and divisible by {factor}")
        found = (self.unet.in_channels, self.unet.out_channels)
        said = f"{found[0]} and {found[1]}; autoencoder {self.autoencoder!r} needs {needed}"
        _require(found == (needed, needed), f"model.unet.in_channels and out_channels are {said}")
        composes = not self.carry.head or self.autoencoder == "patches"
        _require(composes, "model.carry.head composes pixels: it needs config.model.autoencoder 'patches'")
        slots = self.fusion.regions <= MAX_CLASSES
        _require(
            slots, f"model.fusion.regions is {self.fusion.regions}; parsing maps have at most {MAX_CLASSES} regions"
        )
        joins = not self.carry.head or self.fusion.texture != "hpfa" or self.fusion.cosine
        _require(joins, "model.carry.head joins limb coordinates to HPFA's logits: it needs config.model.fusion.cosine")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the training losses. latents: Eq. 2 / 10, the paper's only one. Ours, 0 in the paper's configurations: flow
    (what HPFA and the half-cell head carry lies near the target's latents), pixels (of the decoded x0, and of their differences),
    parsing (what the half-cell head predicts, and its alpha)."""

    latents: FloatFrom0 = 1.0
    flow: FloatFrom0 = 0.0
    pixels: FloatFrom0 = 0.0
    parsing: FloatFrom0 = 0.0


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """timestep_power: t = 1000 u^power. drop_rate: share of samples trained without the source. The others are of sampling;
    guidance_interval: the lowest and the highest t, as shares of schedule.steps, that are guided (ours; the paper: all)."""

    schedule: Schedule = Schedule()
    timestep_power: PositiveFloat = 1.0
    drop_rate: ShareBelow1 = 0.3
    steps: Positive = 35
    sampler: Literal["ddim", "dpmpp_2m", "unipc"] = "ddim"
    spacing: Literal["leading", "trailing"] = "leading"
    guidance: float = 3.5
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    losses: LossConfig = LossConfig()

    def __post_init__(self):
        predicted, needed = self.schedule.prediction, self.losses.pixels or self.losses.parsing
        said = f"{predicted!r}; losses.pixels and losses.parsing need 'x0'"
        _require(not needed or predicted == "x0", f"diffusion.schedule.prediction is {said}")
        low, high = self.guidance_interval
        _require(
            low <= high,
            f"diffusion.guidance_interval is {self.guidance_interval}; the first must not be above the second",
        )


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sizes of the pool of synthetic people. poses: a DeepFashion annotation CSV, or "" for the built-in table."""

    identities: Positive = 4096
    poses_per_identity: Several = 4
    patterns: Literal["all", "solid", "mixed"] = "all"
    background: Literal["all", "plain"] = "all"
    framing: Literal["all", "close"] = "all"
    poses: str = ""
    heldout_identities: Positive = 64
    heldout_poses_per_identity: Several = 2


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """dataset "synthetic"; "folder": photos with parsing maps and keypoints under `root` (input_pipeline/sources/folder.py);
    "records": what `prepare build` wrote to `root` (input_pipeline/records/reader.py).

    pairs, eval_pairs: CSV of (source, target) names, "self" or "identity"; eval_pairs "": the training pairs, said so.
    Of records they name splits: pairs "self" is train, eval_pairs "" is test where there is one. labels: of the
    parsing maps; records know their own, and it may be "".

    latents "stored": train on the records' latents (`prepare annotate --vae`), so that the autoencoder never encodes.
    workers: processes that fill batches, with `threads` each; 0: threads of this one. max_invalid: share of unreadable
    examples that stops the run.
    """

    dataset: Literal["synthetic", "folder", "records"] = "synthetic"
    root: str = ""
    labels: str = "atr18"
    keypoints: str = ""
    pairs: str = "self"
    eval_pairs: str = ""
    flip: bool = False
    self_pair: Share = 0.0
    targets_per_source: Positive = 1
    threads: Positive = 8
    workers: Count = 0
    latents: Literal["off", "stored"] = "off"
    max_invalid: Share = 0.05
    synthetic: SyntheticConfig = SyntheticConfig()

    def __post_init__(self):
        kept = self.latents == "off" or self.dataset == "records"
        _require(kept, "data.latents is 'stored'; only dataset 'records' can hold latents")
        found = self.dataset == "synthetic" or bool(self.root)
        _require(found, f"data.root is empty; dataset '{self.dataset}' needs the folder it lies in")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """name "adamw", or "lamb" (You et al. 2020: AdamW's update, each parameter's scaled to the parameter's own norm).
    trainable: regex over parameter paths ('target_net/mid_block/.../kernel'); what it does not find stays as it
    is, with neither gradient nor moments. schedule "constant" or "cosine" (flat for `flat` of the run, then to `final` of
    the rate). accumulation: micro-batches per step. max_skips: non-finite steps in a row before the run stops. ema_decay
    0: no EMA. layout "tree", or "flat": the update runs on one vector (small networks on one CPU; optim.make_param_layout).
    noise_scale "on": every step's metrics tell the gradient noise scale (training/noise_scale.py); needs accumulation >= 2 or
    mesh.data >= 2.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    trainable: str = ".*"
    learning_rate: PositiveFloat = 1e-5
    warmup_steps: Count = 0
    schedule: Literal["constant", "cosine"] = "constant"
    flat: Share = 0.3
    final: Share = 0.02
    b1: ShareBelow1 = 0.9
    b2: ShareBelow1 = 0.999
    weight_decay: FloatFrom0 = 1e-2
    clip_norm: PositiveFloat = 1.0
    accumulation: Positive = 1
    ema_decay: Share = 0.0
    max_skips: Positive = 10
    layout: Literal["tree", "flat"] = "tree"
    noise_scale: Literal["off", "on"] = "off"

    def __post_init__(self):
        _require(
            (self.name, self.layout) != ("lamb", "flat"),
            "optim.layout 'flat' makes one vector of all parameters, and LAMB needs the norm of each: "
            "set optim.layout to 'tree', or optim.name to 'adamw'",
        )
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ConfigError(f"config.optim.trainable {self.trainable!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1: the rest (one axis at most)."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Save every `every` steps, keep the last `keep`, and for good each multiple of `keep_every` (0: none).
    allow_fallback: where the newest one is damaged, go on from the one before it."""

    every: Positive = 5_000
    keep: Positive = 3
    keep_every: int = 0
    allow_fallback: bool = False

    def __post_init__(self):
        said = f"it must be a multiple of checkpoint.every ({self.every}), or 0 to keep none for good"
        fits = self.keep_every >= 0 and self.keep_every % self.every == 0
        _require(fits, f"checkpoint.keep_every is {self.keep_every}; {said}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Every `every` steps and after the last one (0: never): held-out loss, region PSNR and swap test over `pairs` pairs in
    batches of `batch_size`, and a sample sheet of `sheet_rows` rows (0: none), by `steps` steps of `sampler` at `guidance`."""

    every: Count = 5_000
    pairs: Positive = 64
    batch_size: Positive = 16
    sheet_rows: Count = 8
    sampler: Literal["ddim", "dpmpp_2m", "unipc"] = "ddim"
    steps: Positive = 35
    guidance: float = 3.5


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. batch_size is global; the per-device batch is derived from it. init_from: a folder that `convert
    from-torch` wrote, or the workdir of another run, whose parameters this one starts with; "": random ones."""

    seed: Count = 0
    init_from: str = ""
    total_steps: Positive = 100_000
    batch_size: Positive = 12
    log_every: Positive = 1
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        most = self.diffusion.schedule.steps
        for name, steps in (("diffusion", self.diffusion.steps), ("eval", self.eval.steps)):
            _require(steps <= most, f"{name}.steps is {steps}; it must be at most diffusion.schedule.steps ({most})")
        model, weighs = self.model, self.diffusion.losses
        x0 = not model.carry.head or self.diffusion.schedule.prediction == "x0"
        _require(x0, "model.carry.head adds to x0: config.diffusion.schedule.prediction must be 'x0'")
        carries = not weighs.flow or model.fusion.carry_latents or model.carry.head
        _require(carries, "diffusion.losses.flow needs config.model.fusion.carry_latents or config.model.carry.head")
        predicts = not weighs.parsing or model.carry.head
        _require(predicts, "diffusion.losses.parsing needs config.model.carry.head, which predicts it")
        off, kind = self.data.latents == "off", self.model.autoencoder
        said = f"autoencoder {kind!r}; stored latents are of the VAE ('sd15')"
        _require(off or kind == "sd15", f"data.latents is 'stored' and config.model.{said}")
        said = "fusion.features 'clip'; CLIP needs the photos: set data.latents to 'off'"
        _require(off or not self.model.uses_clip, f"data.latents is 'stored' and config.model.{said}")
        whole = self.optim.layout != "flat" or (self.mesh.fsdp, self.mesh.tensor) == (1, 1)
        _require(whole, "optim.layout 'flat' cannot be sharded: mesh.fsdp and mesh.tensor must be 1")
        micro = self.optim.accumulation * self.data.targets_per_source
        said = f"it must be a multiple of optim.accumulation x data.targets_per_source = {micro}"
        _require(self.batch_size % micro == 0, f"batch_size is {self.batch_size}; {said}")
        if self.mesh.data != -1:
            self.check_noise_scale(self.mesh.data)

    def check_noise_scale(self, data: int) -> None:
        """data: size of the mesh's data axis. Raises ConfigError where nothing smaller than the batch is measured."""
        _require(
            self.optim.noise_scale == "off" or self.optim.accumulation > 1 or data > 1,
            "optim.noise_scale is 'on', but the gradient comes in one piece: set optim.accumulation to 2 or more, or use "
            "a mesh whose data axis is 2 or more",
        )

    @property
    def token_width(self) -> int:
        return self.model.unet.cross_attention_dim


def _convert(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_config_dict(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value, (words, holds) = _convert(value, arguments[0], where), arguments[1]
        if holds(value):
            return value
        raise ConfigError(f"{where} is {value}; it must be {words}")
    if origin is Literal:
        if _convert(value, type(arguments[0]), where) in arguments:
            return value
        raise ConfigError(f"{where} is {value!r}; choose one of {arguments}")
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(value, option, where)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    elif kind in (int, float) and isinstance(value, kind | int) and not isinstance(value, bool):
        bound, words = (math.inf, "finite") if isinstance(value, float) else (2**63, "within 64 bits")
        if abs(value) < bound:
            return kind(value)
        raise ConfigError(f"{where} is {value}; it must be {words}")
    elif kind in (str, bool) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {name}")


def from_config_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Makes the dataclass `cls` from a mapping (a ConfigDict, or a dict read from metadata.json).

    Every field must be there, of its type and in its range, and nothing else. Raises ConfigError.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"{where} is {values!r}; expected a group of settings")
    values = dict(values.items())
    fields = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}.{key} is not a setting; {hint}")
    missing = sorted(fields.keys() - values.keys())
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**{key: _convert(values[key], kind, f"{where}.{key}") for key, kind in fields.items()})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def with_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The saved config of an older run: settings and groups that came later are added, at their defaults (which must
    therefore mean what runs did before them)."""
    return _filled(values, to_dict(cls()))


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    groups = {k for k, v in values.items() if isinstance(v, Mapping) and isinstance(defaults.get(k), Mapping)}
    return {**defaults, **values, **{k: _filled(values[k], defaults[k]) for k in groups}}


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dict of a config, ready for JSON; from_config_dict reads it back."""
    return dataclasses.asdict(config)


def checked(config: Any) -> Any:
    """The same config, read again: dataclasses.replace checks neither types nor ranges. Raises ConfigError."""
    return from_config_dict(type(config), to_dict(config))
