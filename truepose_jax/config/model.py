"""config.model: one class of settings a method, chosen by `method`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from input_pipeline.schema import MAX_CLASSES, NUM_JOINTS
from input_pipeline.skeletons import DRAWINGS
from truepose_jax.config.reader import (
    ConfigError,
    Count,
    FloatFrom0,
    Positive,
    PositiveFloat,
    ShareBelow1,
    UpTo48,
    require,
)
from truepose_jax.models.carry import CarryConfig
from truepose_jax.models.clip import CLIPVisionConfig
from truepose_jax.models.hpfa import FusionConfig
from truepose_jax.models.unet import UNetConfig

if TYPE_CHECKING:
    from truepose_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A frozen network that sees photos. path: its folder; "" makes a small seeded one, untrained, of the sizes that follow
    (and says so)."""

    group: ClassVar[str] = "clip"

    path: str = ""
    image_size: Positive = 32
    patch_size: Positive = 8
    hidden_size: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    seed: Count = 0

    def __post_init__(self):
        fits = self.patch_size <= self.image_size and self.hidden_size % self.heads == 0
        require(
            bool(self.path) or fits,
            f"model.{self.group} has image_size {self.image_size} and patch_size {self.patch_size}, hidden_size "
            f"{self.hidden_size} and heads {self.heads}; a patch must fit into the image, heads must divide hidden_size",
        )


@dataclasses.dataclass(frozen=True)
class ClipConfig(EncoderConfig):
    """The region-token encoder, a transformers CLIP vision folder."""


@dataclasses.dataclass(frozen=True)
class DinoConfig(EncoderConfig):
    """DINOv2, a transformers folder. image_size: of the square that it is shown, whatever size its positions were trained at.
    position_offset: of their bicubic interpolation; 0.1 is the original's and that of transformers before 2025, 0 the later."""

    group: ClassVar[str] = "dino"

    position_offset: FloatFrom0 = 0.1


@dataclasses.dataclass(frozen=True)
class FirstStageConfig(EncoderConfig):
    """What `convert to-torch` wrote of a run of the method ipf. image_size must be its CLIP's; seeded, its embedding is
    `width` wide."""

    group: ClassVar[str] = "ipf"

    width: Positive = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Of every method. size: (height, width) in pixels. dtype: compute dtype; parameters are float32. remat: recompute blocks
    in the backward pass. attention: the implementation that the method's attention takes (kernels/attention/api.py), "auto":
    what suits the device and the sizes, of those that have run on one of its kind. skeleton: which joints a pose has, and how it
    is drawn (input_pipeline/skeletons.py)."""

    method: str = ""
    size: tuple[int, int] = (512, 352)
    remat: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "reference", "xla", "per_image", "pallas_tpu", "pallas_gpu", "cudnn"] = "auto"
    skeleton: Literal["cfld", "openpose", "pidm", "wholebody133"] = "cfld"

    @classmethod
    def variant(cls, values: Mapping[str, Any], where: str) -> type[ModelConfig]:
        """The class of the method that `values` name. Raises ConfigError for an unknown one, and for another's settings."""
        method = values.get("method", TruePoseModel.method)
        if not isinstance(method, str) or method not in MODELS:
            raise ConfigError(f"{where}.method is {method!r}; choose one of {tuple(MODELS)}")
        chosen = MODELS[method]
        own = {field.name for field in dataclasses.fields(chosen)}
        for key in sorted(values.keys() - own):
            owners = [name for name, kind in MODELS.items() if key in {f.name for f in dataclasses.fields(kind)}]
            if owners and not difflib.get_close_matches(key, own, n=1, cutoff=0.8):
                raise ConfigError(f"{where}.{key} is a setting of {' and '.join(owners)}; {where}.method is {method!r}")
        return chosen

    def check(self, config: Config) -> None:
        """What must hold between this group and the others. Raises ConfigError."""

    @property
    def folders(self) -> dict[str, str]:
        """Where frozen networks lie, by the setting or the group that says so: "vae", "clip", "dino", "ipf"; "" where none is
        named."""
        named = {name: getattr(self, name, None) for name in ("vae", "clip", "dino", "ipf")}
        found = {name: x.path for name, x in named.items() if isinstance(x, EncoderConfig)}
        return found | ({} if named["vae"] is None else {"vae": named["vae"]})

    def located(self, folders: Mapping[str, str], *, anew: bool = False) -> Self:
        """With these folders where none is named, or (anew) whatever is; what this method has not is left alone."""
        changes: dict[str, Any] = {}
        for name, old in self.folders.items():
            folder = folders.get(name, "")
            if folder and (anew or not old):
                own = getattr(self, name)
                changes[name] = folder if isinstance(own, str) else dataclasses.replace(own, path=folder)
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class DenoiserModel(ModelConfig):
    """Of methods that denoise. autoencoder "sd15": AutoencoderKL from the diffusers folder `vae`; "pixels": space-to-depth by
    `pixel_factor`, no weights; "patches": `patch_channels` principal components of 4x4 pixels, of the file `vae` or, where that
    is "", of the one that comes along (models/patch_codec.py). positions "sincos": fixed 2-D sinusoids after conv_in, for
    training from nothing (SD1.5's networks have learned places and take "none"). pose_encoder: "four_conv", or "controlnet",
    ControlNet's eight convolutions."""

    autoencoder: Literal["sd15", "pixels", "patches"] = "sd15"
    vae: str = ""
    pixel_factor: Literal[2, 4, 8] = 8
    patch_channels: UpTo48 = 24
    unet: UNetConfig = UNetConfig(attention_head_dim=(8,) * 4)
    positions: Literal["none", "sincos"] = "none"
    pose_encoder: Literal["four_conv", "controlnet"] = "four_conv"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell and side."""
        return self.pixel_factor if self.autoencoder == "pixels" else 8

    @property
    def latent_channels(self) -> int:
        return {"pixels": 3 * self.pixel_factor**2, "patches": 4 * self.patch_channels}.get(self.autoencoder, 4)

    @property
    def extra_channels(self) -> int:
        """What the UNet reads beside the noisy latent."""
        return 0

    def __post_init__(self):
        factor, needed = self.latent_factor, self.latent_channels
        fits = all(side > 0 and side % factor == 0 for side in self.size)
        require(fits, f"model.size is {self.size}; both sides must be above 0 and divisible by {factor}")
        found, wanted = (self.unet.in_channels, self.unet.out_channels), (needed + self.extra_channels, needed)
        more = f" and {self.method} reads {self.extra_channels} beside it" if self.extra_channels else ""
        said = f"{found[0]} and {found[1]}; autoencoder {self.autoencoder!r} needs {needed}{more}"
        require(found == wanted, f"model.unet.in_channels and out_channels are {said}")

    def check(self, config: Config) -> None:
        kind = self.autoencoder
        said = f"autoencoder {kind!r}; stored latents are of the VAE ('sd15')"
        require(config.data.latents == "off" or kind == "sd15", f"data.latents is 'stored' and config.model.{said}")


@dataclasses.dataclass(frozen=True)
class TruePoseModel(DenoiserModel):
    """source_parsing "coverage": the source's parsing map is added after SourceNet's conv_in (not in the paper; "none")."""

    method: Literal["truepose"] = "truepose"
    fusion: FusionConfig = FusionConfig()
    carry: CarryConfig = CarryConfig()
    source_parsing: Literal["none", "coverage"] = "none"
    clip: ClipConfig = ClipConfig()

    @property
    def uses_clip(self) -> bool:
        """Whether the network itself looks through CLIP at the source (ablation B1), beside its region tokens."""
        return self.fusion.features == "clip"

    def __post_init__(self):
        super().__post_init__()
        known = DRAWINGS[self.skeleton].joints == NUM_JOINTS
        said = f"its classes are switched on by OpenPose's {NUM_JOINTS} joints alone"
        require(known, f"model.skeleton is {self.skeleton!r} and model.method 'truepose'; {said}")
        composes = not self.carry.head or self.autoencoder == "patches"
        require(composes, "model.carry.head composes pixels: it needs config.model.autoencoder 'patches'")
        slots = self.fusion.regions <= MAX_CLASSES
        require(
            slots, f"model.fusion.regions is {self.fusion.regions}; parsing maps have at most {MAX_CLASSES} regions"
        )
        joins = not self.carry.head or self.fusion.texture != "hpfa" or self.fusion.cosine
        require(joins, "model.carry.head joins limb coordinates to HPFA's logits: it needs config.model.fusion.cosine")

    def check(self, config: Config) -> None:
        super().check(config)
        weighs, prediction = config.diffusion.losses, config.diffusion.schedule.prediction
        x0 = not self.carry.head or prediction == "x0"
        require(x0, "model.carry.head adds to x0: config.diffusion.schedule.prediction must be 'x0'")
        carries = not weighs.flow or self.fusion.carry_latents or self.carry.head
        require(carries, "diffusion.losses.flow needs config.model.fusion.carry_latents or config.model.carry.head")
        predicts = not weighs.parsing or self.carry.head
        require(predicts, "diffusion.losses.parsing needs config.model.carry.head, which predicts it")
        said = "fusion.features 'clip'; CLIP needs the photos: set data.latents to 'off'"
        off = config.data.latents == "off"
        require(off or not self.uses_clip, f"data.latents is 'stored' and config.model.{said}")


@dataclasses.dataclass(frozen=True)
class FirstStageModel(ModelConfig):
    """FPDM's first stage. clip: the tower that sees source, target and pose, trained; config.init_from gives its weights.
    dropout: in the combiner. temperature of the cosines; raw: weight of mean |S - F|."""

    method: Literal["ipf"] = "ipf"
    clip: CLIPVisionConfig = CLIPVisionConfig()
    dropout: ShareBelow1 = 0.5
    temperature: PositiveFloat = 0.07
    raw: FloatFrom0 = 1e-4

    def check(self, config: Config) -> None:
        one = config.optim.accumulation == 1 and config.optim.noise_scale == "off"
        said = "its loss compares all rows of a batch: optim.accumulation must be 1 and optim.noise_scale 'off'"
        require(one, f"model.method is 'ipf'; {said}")
        require(config.data.latents == "off", "data.latents is 'stored' and config.model.method 'ipf' sees photos")
        require(config.data.targets_per_source == 1, "data.targets_per_source must be 1 for config.model.method 'ipf'")
        plain = not (config.data.flip or config.data.self_pair)
        require(
            plain,
            "data.flip and data.self_pair must be off for config.model.method 'ipf': its rows are pairs as they are",
        )


def _plain_losses(model: DenoiserModel, config: Config) -> None:
    """The further losses are TruePose's. Raises ConfigError."""
    weighs = config.diffusion.losses
    plain = (weighs.latents, weighs.flow, weighs.pixels, weighs.parsing) == (1.0, 0.0, 0.0, 0.0)
    require(plain, f"diffusion.losses are truepose's; config.model.method {model.method!r} has the latents' alone")


@dataclasses.dataclass(frozen=True)
class FPDMModel(DenoiserModel):
    """FPDM's second stage. dino: what makes the source's tokens. ipf: the frozen first stage; fusion_embedding off leaves it out
    (the paper's "only the second stage"). dropout: in the two projections. source_share: guidance by pose and source, as a
    share of the guidance by all three; 1 needs two calls a step and not three."""

    method: Literal["fpdm"] = "fpdm"
    pose_encoder: Literal["four_conv", "controlnet"] = "controlnet"
    dino: DinoConfig = DinoConfig()
    ipf: FirstStageConfig = FirstStageConfig()
    fusion_embedding: bool = True
    projection: Positive = 768
    dropout: ShareBelow1 = 0.2
    source_share: FloatFrom0 = 1.0

    def check(self, config: Config) -> None:
        super().check(config)
        _plain_losses(self, config)
        require(config.data.latents == "off", "data.latents is 'stored' and config.model.method 'fpdm' sees photos")


@dataclasses.dataclass(frozen=True)
class IMAGPoseModel(DenoiserModel):
    """size: of one of the four tiles of a canvas. dino, texture: the two halves of FLC, tokens of the reference by DINOv2 and
    of its latent by a convolution of `patch` cells (texture off: the first alone). ilc_image: the given tiles' latents beside
    their flags. cva: attention among the tiles after every layer. mask_all: the paper's fourth pattern, with nothing given."""

    method: Literal["imagpose"] = "imagpose"
    size: tuple[int, int] = (512, 512)
    unet: UNetConfig = UNetConfig(in_channels=9, attention_head_dim=(8,) * 4)
    pose_encoder: Literal["four_conv", "controlnet"] = "controlnet"
    dino: DinoConfig = DinoConfig(image_size=224)
    texture: bool = True
    patch: Positive = 16
    ilc_image: bool = True
    cva: bool = True
    mask_all: bool = False

    @property
    def extra_channels(self) -> int:
        return 1 + (self.latent_channels if self.ilc_image else 0)

    def __post_init__(self):
        super().__post_init__()
        multiple = self.latent_factor * 2 ** (len(self.unet.block_out_channels) - 1)
        near = tuple(max(round(side / multiple), 1) * multiple for side in self.size)
        halves = all(side % multiple == 0 for side in self.size)
        said = f"every level must cut in two, so sides are multiples of {multiple}, as in {near}"
        require(halves, f"model.size is {self.size}; {said}")
        cell = self.latent_factor * self.patch
        cut = not self.texture or all(side % cell == 0 for side in self.size)
        require(cut, f"model.size is {self.size}; the texture's patches are {cell} pixels wide and must fill it")

    def check(self, config: Config) -> None:
        super().check(config)
        _plain_losses(self, config)
        require(
            config.data.latents == "off", "data.latents is 'stored' and config.model.method 'imagpose' sees canvases"
        )
        one = config.data.targets_per_source == 1 and not config.data.self_pair
        require(
            one, "data.targets_per_source must be 1 and self_pair 0 for 'imagpose': a row is a canvas of one person"
        )


MODELS: dict[str, type[ModelConfig]] = {
    kind.method: kind for kind in (TruePoseModel, FirstStageModel, FPDMModel, IMAGPoseModel)
}
