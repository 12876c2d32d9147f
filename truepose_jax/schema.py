"""The configuration the code runs on: frozen dataclasses, and the strict reader that makes them from a ConfigDict.

configs/base.py lists every key with its value; here are the types and what is allowed. A key that is unknown,
missing or of another type is a ConfigError that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from truepose_jax.diffusion.schedule import Schedule
from truepose_jax.models.carry import CarryConfig
from truepose_jax.models.hpfa import FusionConfig
from truepose_jax.models.unet import UNetConfig


class ConfigError(ValueError):
    """A configuration that cannot be run: one line that names the key, its value and what is allowed."""


def _one_of(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"config.{key} is {value!r}; choose one of {allowed}")


def _positive(**values: float) -> None:
    for key, value in values.items():
        if value <= 0:
            raise ConfigError(f"config.{key.replace('__', '.')} is {value}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The region-token encoder. path: a transformers CLIP vision folder; "" makes a small seeded one, untrained, of
    the sizes that follow (and says so)."""

    path: str
    image_size: int
    patch_size: int
    hidden_size: int
    layers: int
    heads: int
    seed: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """size: (height, width) in pixels. autoencoder "sd15": AutoencoderKL from the diffusers folder `vae`; "pixels":
    space-to-depth by `pixel_factor`, no weights; "patches": `patch_channels` principal components of 4x4 pixels, of the file
    `vae` or, where it is "", of the one that comes along (models/patch_codec.py). positions "sincos": fixed 2-D sinusoids after both networks' conv_in,
    for training from nothing (SD1.5's networks have learned places and take "none"). source_parsing "coverage": the
    source's parsing map is added there too, in SourceNet (not in the paper; "none"). dtype: compute dtype; parameters
    are float32."""

    method: str
    size: tuple[int, int]
    autoencoder: str
    vae: str
    pixel_factor: int
    unet: UNetConfig
    fusion: FusionConfig
    positions: str
    source_parsing: str
    clip: ClipConfig
    remat: bool
    dtype: str
    patch_channels: int = 24
    carry: CarryConfig = CarryConfig()

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
        _one_of("model.method", self.method, ("truepose",))
        _one_of("model.autoencoder", self.autoencoder, ("sd15", "pixels", "patches"))
        _one_of("model.positions", self.positions, ("none", "sincos"))
        _one_of("model.source_parsing", self.source_parsing, ("none", "coverage"))
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("model.pixel_factor", self.pixel_factor, (2, 4, 8))
        _positive(model__size=min(self.size))
        if not 1 <= self.patch_channels <= 48:
            raise ConfigError(f"config.model.patch_channels is {self.patch_channels}; it must be from 1 to 48")
        factor, channels = self.latent_factor, self.latent_channels
        if any(side % factor for side in self.size):
            raise ConfigError(f"config.model.size is {self.size}; both sides must be divisible by {factor}")
        if (self.unet.in_channels, self.unet.out_channels) != (channels, channels):
            raise ConfigError(
                f"config.model.unet.in_channels and out_channels are {self.unet.in_channels} and "
                f"{self.unet.out_channels}; autoencoder {self.autoencoder!r} needs {channels}"
            )
        if self.carry.head and self.autoencoder != "patches":
            raise ConfigError("config.model.carry.head needs config.model.autoencoder 'patches': it composes pixels")
        if self.carry.head and self.fusion.texture == "hpfa" and not self.fusion.cosine:
            raise ConfigError("config.model.carry.head needs config.model.fusion.cosine: limb coordinates join its logits")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the training losses. latents: Eq. 2 / 10, the paper's only one. Ours, 0 in the paper's configurations: flow
    (what HPFA and the half-cell head carry lies near the target's latents), pixels (of the decoded x0, and of its differences),
    parsing (what the half-cell head predicts, and its alpha)."""

    latents: float = 1.0
    flow: float = 0.0
    pixels: float = 0.0
    parsing: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"config.diffusion.losses.{name} is {value}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """timestep_power: t = 1000 u^power. drop_rate: share of samples trained without the source. steps, spacing,
    guidance: DDIM's."""

    schedule: Schedule
    timestep_power: float
    drop_rate: float
    steps: int
    spacing: str
    guidance: float
    losses: LossConfig = LossConfig()

    def __post_init__(self):
        if (self.losses.pixels or self.losses.parsing) and self.schedule.prediction != "x0":
            raise ConfigError(
                f"config.diffusion.schedule.prediction is {self.schedule.prediction!r}; losses.pixels and losses.parsing need 'x0'"
            )
        _one_of("diffusion.spacing", self.spacing, ("leading", "trailing"))
        _positive(diffusion__timestep_power=self.timestep_power, diffusion__steps=self.steps)
        if not 0.0 <= self.drop_rate < 1.0:
            raise ConfigError(f"config.diffusion.drop_rate is {self.drop_rate}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sizes of the pool of synthetic people. poses: a DeepFashion annotation CSV, or "" for the built-in table."""

    identities: int
    poses_per_identity: int
    patterns: str
    background: str
    framing: str
    poses: str
    heldout_identities: int
    heldout_poses_per_identity: int

    def __post_init__(self):
        _one_of("data.synthetic.patterns", self.patterns, ("all", "solid", "mixed"))
        _one_of("data.synthetic.background", self.background, ("all", "plain"))
        _one_of("data.synthetic.framing", self.framing, ("all", "close"))
        _positive(
            data__synthetic__identities=self.identities,
            data__synthetic__heldout_identities=self.heldout_identities,
            data__synthetic__poses_per_identity=self.poses_per_identity - 1,
            data__synthetic__heldout_poses_per_identity=self.heldout_poses_per_identity - 1,
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """dataset "synthetic"; "folder": photos with parsing maps and keypoints under `root` (input_pipeline/folder.py);
    "records": what `prepare build` wrote to `root` (input_pipeline/records.py).

    pairs, eval_pairs: CSV of (source, target) names, "self" or "identity"; eval_pairs "": the training pairs, said so.
    Of records they name splits: pairs "self" is train, eval_pairs "" is test where there is one. labels: of the
    parsing maps; records know their own, and it may be "".

    latents "stored": train on the records' latents (`prepare annotate --vae`), so that the autoencoder never encodes.
    workers: processes that fill batches, with `threads` each; 0: threads of this one. max_invalid: share of unreadable
    examples that stops the run.
    """

    dataset: str
    root: str
    labels: str
    keypoints: str
    pairs: str
    eval_pairs: str
    flip: bool
    self_pair: float
    targets_per_source: int
    threads: int
    workers: int
    latents: str
    max_invalid: float
    synthetic: SyntheticConfig

    def __post_init__(self):
        _one_of("data.dataset", self.dataset, ("synthetic", "folder", "records"))
        _positive(data__targets_per_source=self.targets_per_source, data__threads=self.threads)
        _one_of("data.latents", self.latents, ("off", "stored"))
        if self.workers < 0:
            raise ConfigError(f"config.data.workers is {self.workers}; it must be 0 or more")
        for key in ("self_pair", "max_invalid"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"config.data.{key} is {getattr(self, key)}; it must be in [0, 1]")
        if self.latents == "stored" and self.dataset != "records":
            raise ConfigError("config.data.latents is 'stored'; only dataset 'records' can hold latents")
        if self.dataset in ("folder", "records") and not self.root:
            raise ConfigError(f"config.data.root is empty; dataset '{self.dataset}' needs the folder it lies in")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """name "adamw", or "lamb" (You et al. 2020: AdamW's update, each parameter's scaled to the parameter's own norm).
    trainable: regex over parameter paths ('target_net/mid_block/.../kernel'); what it does not find stays as it
    is, with neither gradient nor moments. schedule "constant" or "cosine" (flat for `flat` of the run, then to `final` of
    the rate). accumulation: micro-batches per step. max_skips: non-finite steps in a row before the run stops. ema_decay
    0: no EMA. layout "tree", or "flat": the update runs on one vector (small networks on one CPU; optim.make_packing).
    noise_scale "on": every step's metrics tell the gradient noise scale (noise_scale.py); needs accumulation >= 2 or
    mesh.data >= 2.
    """

    name: str
    trainable: str
    learning_rate: float
    warmup_steps: int
    schedule: str
    flat: float
    final: float
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    accumulation: int
    ema_decay: float
    max_skips: int
    layout: str
    noise_scale: str

    def __post_init__(self):
        _one_of("optim.name", self.name, ("adamw", "lamb"))
        _one_of("optim.noise_scale", self.noise_scale, ("off", "on"))
        if self.name == "lamb" and self.layout == "flat":
            raise ConfigError(
                "config.optim.layout 'flat' makes one vector of all parameters, and LAMB needs the norm of each: "
                "set optim.layout to 'tree', or optim.name to 'adamw'"
            )
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ConfigError(f"config.optim.trainable {self.trainable!r} is no regular expression: {error}") from error
        _one_of("optim.schedule", self.schedule, ("constant", "cosine"))
        _one_of("optim.layout", self.layout, ("tree", "flat"))
        _positive(
            optim__learning_rate=self.learning_rate,
            optim__clip_norm=self.clip_norm,
            optim__accumulation=self.accumulation,
            optim__max_skips=self.max_skips,
        )
        for key in ("ema_decay", "b1", "b2", "flat", "final"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"config.optim.{key} is {getattr(self, key)}; it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1: the rest (one axis at most)."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Save every `every` steps, keep the last `keep`, and for good each multiple of `keep_every` (0: none).
    allow_fallback: where the newest one is damaged, go on from the one before it."""

    every: int
    keep: int
    keep_every: int
    allow_fallback: bool

    def __post_init__(self):
        _positive(checkpoint__every=self.every, checkpoint__keep=self.keep)
        if self.keep_every < 0 or self.keep_every % self.every:
            raise ConfigError(
                f"config.checkpoint.keep_every is {self.keep_every}; it must be a multiple of checkpoint.every "
                f"({self.every}), or 0 to keep none for good"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Every `every` steps: held-out loss, region PSNR and swap test over `pairs` pairs in batches of `batch_size`, and
    a sample sheet of `sheet_rows` rows, sampled with `steps` steps at `guidance`."""

    every: int
    pairs: int
    batch_size: int
    sheet_rows: int
    steps: int
    guidance: float

    def __post_init__(self):
        _positive(
            eval__every=self.every, eval__pairs=self.pairs, eval__batch_size=self.batch_size, eval__steps=self.steps
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. batch_size is global; the per-device batch is derived from it. init_from: a folder that `convert
    from-torch` wrote, or the workdir of another run, whose parameters this one starts with; "": random ones."""

    seed: int
    init_from: str
    total_steps: int
    batch_size: int
    log_every: int
    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    optim: OptimConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig

    def __post_init__(self):
        _positive(total_steps=self.total_steps, batch_size=self.batch_size, log_every=self.log_every)
        if self.data.latents == "stored" and self.model.autoencoder != "sd15":
            raise ConfigError(
                f"config.data.latents is 'stored' and config.model.autoencoder {self.model.autoencoder!r}; stored latents "
                "are of the VAE ('sd15')"
            )
        if self.data.latents == "stored" and self.model.uses_clip:
            raise ConfigError(
                "config.data.latents is 'stored' and config.model.fusion.features 'clip'; CLIP needs the photos: set "
                "data.latents to 'off'"
            )
        model, weighs = self.model, self.diffusion.losses
        if model.carry.head and self.diffusion.schedule.prediction != "x0":
            raise ConfigError("config.model.carry.head adds to x0: config.diffusion.schedule.prediction must be 'x0'")
        if weighs.flow and not (model.fusion.carry_latents or model.carry.head):
            raise ConfigError("config.diffusion.losses.flow needs config.model.fusion.carry_latents or config.model.carry.head")
        if weighs.parsing and not model.carry.head:
            raise ConfigError("config.diffusion.losses.parsing needs config.model.carry.head, which predicts it")
        if self.optim.layout == "flat" and (self.mesh.fsdp, self.mesh.tensor) != (1, 1):
            raise ConfigError("config.optim.layout 'flat' cannot be sharded: mesh.fsdp and mesh.tensor must be 1")
        micro = self.optim.accumulation * self.data.targets_per_source
        if self.batch_size % micro:
            raise ConfigError(
                f"config.batch_size is {self.batch_size}; it must be a multiple of optim.accumulation x "
                f"data.targets_per_source = {micro}"
            )

        if self.mesh.data != -1:
            self.check_noise_scale(self.mesh.data)

    def check_noise_scale(self, data: int) -> None:
        """data: size of the mesh's data axis. Raises ConfigError where nothing smaller than the batch is measured."""
        if self.optim.noise_scale == "on" and self.optim.accumulation == 1 and data == 1:
            raise ConfigError(
                "config.optim.noise_scale is 'on', but the gradient comes in one piece: set optim.accumulation to 2 or "
                "more, or use a mesh whose data axis is 2 or more"
            )

    @property
    def token_width(self) -> int:
        return self.model.unet.cross_attention_dim


def _convert(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_config_dict(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
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
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {name}")


def from_config_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Makes the dataclass `cls` from a mapping (a ConfigDict, or a dict read from metadata.json).

    Every field must be there and of its type, and nothing else. Raises ConfigError.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"{where} is {values!r}; expected a group of settings")
    values = dict(values.items())
    kinds = typing.get_type_hints(cls)
    fields = {field.name: kinds[field.name] for field in dataclasses.fields(cls)}
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
    """The saved config of an older run: settings that came later, and have a default, are added."""
    found, kinds = dict(values), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in found:
            if field.default is not dataclasses.MISSING:
                found[field.name] = field.default
        elif dataclasses.is_dataclass(kinds[field.name]) and isinstance(found[field.name], Mapping):
            found[field.name] = with_defaults(kinds[field.name], found[field.name])
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dict of a config, ready for JSON; from_config_dict reads it back."""
    return dataclasses.asdict(config)
