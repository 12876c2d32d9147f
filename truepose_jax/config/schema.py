"""Every setting there is, with its type, its range and its default (the TruePose paper's value where it has one), as frozen
dataclasses. Those of config.model, one class a method, are in model.py beside this file.

configs/ say what differs from the defaults. A key that is unknown, missing or of another type, and a value out of its
range, are a ConfigError that names it. Every float must be finite.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from truepose_jax.config.model import ModelConfig, TruePoseModel
from truepose_jax.config.reader import (
    AxisSize,
    ConfigError,
    Count,
    FloatFrom0,
    Positive,
    PositiveFloat,
    Several,
    Share,
    ShareBelow1,
    require,
)
from truepose_jax.diffusion.schedule import Schedule


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
    """timestep_power: t = 1000 u^power. drop_rate: share of samples trained without a condition: TruePose without the source;
    FPDM without pose, source tokens and fused embedding, each by itself; IMAGPose without either half of the texture, and
    without both. noise_offset: noise per channel of this size beside the noise, in training. min_snr: gamma of the losses'
    weights by noise level; 0: all weigh 1. The others are of sampling; guidance_interval: the lowest and the highest t, as shares
    of schedule.steps, that are guided (ours; the paper: all)."""

    schedule: Schedule = Schedule()
    timestep_power: PositiveFloat = 1.0
    drop_rate: ShareBelow1 = 0.3
    noise_offset: FloatFrom0 = 0.0
    min_snr: FloatFrom0 = 0.0
    steps: Positive = 35
    sampler: Literal["ddim", "ddpm", "dpmpp_2m", "unipc"] = "ddim"
    spacing: Literal["leading", "trailing"] = "leading"
    guidance: float = 3.5
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    losses: LossConfig = LossConfig()

    def __post_init__(self):
        predicted, needed = self.schedule.prediction, self.losses.pixels or self.losses.parsing
        said = f"{predicted!r}; losses.pixels and losses.parsing need 'x0'"
        require(not needed or predicted == "x0", f"diffusion.schedule.prediction is {said}")
        starts = not self.schedule.zero_snr or self.spacing == "trailing"
        require(starts, "diffusion.schedule.zero_snr needs spacing 'trailing', which starts where there is no signal")
        finite = not self.schedule.zero_snr or self.sampler in ("ddim", "ddpm")
        said = "whose time is log SNR; schedule.zero_snr needs 'ddim' or 'ddpm'"
        require(finite, f"diffusion.sampler is {self.sampler!r}, {said}")
        low, high = self.guidance_interval
        require(
            low <= high,
            f"diffusion.guidance_interval is {self.guidance_interval}; the first must not be above the second",
        )


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sizes of the pool of synthetic people. poses: a DeepFashion annotation CSV, or "" for the built-in table."""

    identities: Positive = 4096
    poses_per_identity: Several = 4
    patterns: Literal["all", "solid", "mixed", "two_sided"] = "all"
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
        require(kept, "data.latents is 'stored'; only dataset 'records' can hold latents")
        found = self.dataset == "synthetic" or bool(self.root)
        require(found, f"data.root is empty; dataset '{self.dataset}' needs the folder it lies in")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (training/lora.py). rank 0: none; else they alone train. alpha: as in PEFT, alpha / rank scales them.
    targets: regex over parameter paths, of the matrices that get one: attention projections, HPFA's among them."""

    rank: Count = 0
    alpha: PositiveFloat = 8.0
    targets: str = r"/(attn\d|hpfa|attention_blocks_\d)/(source_)?to_(q|k|v|out_0)/kernel$"

    def __post_init__(self):
        _check_regex("optim.lora.targets", self.targets)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"config.{name} {pattern!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """name "adamw", or "lamb" (You et al. 2020: AdamW's update, each parameter's scaled to the parameter's own norm).
    trainable: regex over parameter paths ('target_net/mid_block/.../kernel'); what it does not find stays as it
    is, with neither gradient nor moments. schedule "constant", "cosine" (flat for `flat` of the run, then to `final` of
    the rate) or "step" (there at once). accumulation: micro-batches per step. max_skips: non-finite steps in a row before the
    run stops. ema_decay 0: no EMA. layout "tree", or "flat": the update runs on one vector (small networks on one CPU;
    optim.make_param_layout). noise_scale "on": every step's metrics tell the gradient noise scale (training/noise_scale.py);
    needs accumulation >= 2 or mesh.data >= 2.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    trainable: str = ".*"
    learning_rate: PositiveFloat = 1e-5
    warmup_steps: Count = 0
    schedule: Literal["constant", "cosine", "step"] = "constant"
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
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        require(
            (self.name, self.layout) != ("lamb", "flat"),
            "optim.layout 'flat' makes one vector of all parameters, and LAMB needs the norm of each: "
            "set optim.layout to 'tree', or optim.name to 'adamw'",
        )
        _check_regex("optim.trainable", self.trainable)
        alone = not self.lora.rank or self.trainable == ".*"
        said = "optim.lora.rank above 0 trains the adapters alone; choose them by optim.lora.targets"
        require(alone, f"optim.trainable is {self.trainable!r}, and {said}")


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
        require(fits, f"checkpoint.keep_every is {self.keep_every}; {said}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Every `every` steps and after the last one (0: never): held-out loss, region PSNR and swap test over `pairs` pairs in
    batches of `batch_size`, and a sample sheet of `sheet_rows` rows (0: none), by `steps` steps of `sampler` at `guidance`."""

    every: Count = 5_000
    pairs: Positive = 64
    batch_size: Positive = 16
    sheet_rows: Count = 8
    sampler: Literal["ddim", "ddpm", "dpmpp_2m", "unipc"] = "ddim"
    steps: Positive = 35
    guidance: float = 3.5


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. batch_size is global; the per-device batch is derived from it. tracker: who gets numbers and pictures too,
    as a run of tracker_project; its package must be installed. init_from: a folder that `convert from-torch` wrote, or the
    workdir of another run, whose parameters this one starts with; "": random ones."""

    seed: Count = 0
    init_from: str = ""
    total_steps: Positive = 100_000
    batch_size: Positive = 12
    log_every: Positive = 1
    tracker: Literal["none", "wandb", "trackio"] = "none"
    tracker_project: str = "truepose"
    model: ModelConfig = TruePoseModel()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        most = self.diffusion.schedule.steps
        for name, steps in (("diffusion", self.diffusion.steps), ("eval", self.eval.steps)):
            require(steps <= most, f"{name}.steps is {steps}; it must be at most diffusion.schedule.steps ({most})")
        self.model.check(self)
        base = not self.optim.lora.rank or bool(self.init_from)
        require(base, "optim.lora trains adapters of weights that stay as they are: name these by init_from")
        whole = self.optim.layout != "flat" or (self.mesh.fsdp, self.mesh.tensor) == (1, 1)
        require(whole, "optim.layout 'flat' cannot be sharded: mesh.fsdp and mesh.tensor must be 1")
        micro = self.optim.accumulation * self.data.targets_per_source
        said = f"it must be a multiple of optim.accumulation x data.targets_per_source = {micro}"
        require(self.batch_size % micro == 0, f"batch_size is {self.batch_size}; {said}")
        if self.mesh.data != -1:
            self.check_noise_scale(self.mesh.data)

    def check_noise_scale(self, data: int) -> None:
        """data: size of the mesh's data axis. Raises ConfigError where nothing smaller than the batch is measured."""
        require(
            self.optim.noise_scale == "off" or self.optim.accumulation > 1 or data > 1,
            "optim.noise_scale is 'on', but the gradient comes in one piece: set optim.accumulation to 2 or more, or use "
            "a mesh whose data axis is 2 or more",
        )

    @property
    def token_width(self) -> int:
        """Of a region token."""
        return self.model.unet.cross_attention_dim
