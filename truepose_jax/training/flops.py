"""How many floating-point operations TruePose takes, from the configuration alone, and what share of a chip's peak that is.

Model FLOPs: two per multiplication of every convolution (padding multiplied too), dense layer and attention product, heads at
their true width; sums, norms, activations, softmaxes and what is only logged are left out, and rematerialisation is not counted.

Of a training step with every parameter trained, a part takes, in units of its forward pass:
  3  as a rule: forward, gradient by its input, gradient by its weights (an attention's two products: four in the backward pass)
  2  where the input needs no gradient: what reads latents (carried ones too), timesteps, tokens, skeletons or coverages
  1  queries and keys of SourceNet's attn2, which meets one token alone: its softmax is 1 whatever they are
  0  SourceNet after its last tap: nothing reads it
The autoencoder and CLIP are frozen, run before the step or once per picture, and are no part of these numbers.

`flops_of` counts the same products in any traced program, of any method.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from jax.extend import core

from input_pipeline.schema import MAX_CLASSES
from truepose_jax.config import Config, ConfigError
from truepose_jax.models.pose_encoder import HIDDEN
from truepose_jax.models.unet import UNetConfig
from truepose_jax.training.memory import inner_jaxprs

PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL|H200 NVL", 835e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100|A800", 312e12),
    (r"TPU v4$|^v4$", 275e12),
    (r"TPU v5 lite|v5e", 197e12),
    (r"TPU v5p|TPU v5$|^v5p$", 459e12),
    (r"TPU v6 lite|v6e", 918e12),
)
"""(pattern over the device's name, dense bf16 FLOPs a second): the first that is found. NVIDIA's data sheets of A100, H100 and
H200 (halved where they state sparsity); cloud.google.com/tpu/docs, system architecture of each version."""


@dataclasses.dataclass(frozen=True)
class Part:
    """forward: FLOPs of one image's forward pass. times: of it in a training step (the module's docstring)."""

    name: str
    forward: int
    times: int = 3


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per image. source: SourceNet and the source side of HPFA and CAA, with the parsing encoder. pose: the pose
    encoder. conditional, null: TargetNet's forward pass with the source and without. train: of a training step, where
    data.targets_per_source targets share SourceNet's pass."""

    source: int
    pose: int
    conditional: int
    null: int
    train: int

    def sample(self, steps: int, guidance: float) -> int:
        """Of a picture by `steps` of DDIM: the source's side once, the null branch only where there is guidance."""
        branches = self.conditional + (0 if guidance == 1.0 else self.null)
        return self.source + self.pose + steps * branches


def model_flops(config: Config) -> Flops:
    """Of a configuration, by its UNet, its fusion and its size. Training counts data.targets_per_source targets per source.

    Raises ConfigError where `is_counted` is false.
    """
    model = config.model
    if not is_counted(config):
        raise ConfigError(
            "FLOPs are counted for HPFA and CAA alone; config.model has one of their ablations (fusion) or a half-cell "
            "head (carry.head)"
        )
    factor, h, w = _latents(config)
    source = source_parts(config)
    fusion = list(_fusion(config, h, w))
    pose = list(_pose_encoder(config, factor, h, w))
    target = list(_unet(model.unet, h, w, _target_block(config)))
    null = list(_unet(model.unet, h, w, _null_block(config)))

    def trained(parts: list[Part]) -> int:
        return sum(part.forward * part.times for part in parts)

    return Flops(
        source=_sum(source) + _sum(fusion),
        pose=_sum(pose),
        conditional=_sum(target),
        null=_sum(null),
        train=trained(source) // config.data.targets_per_source + trained(fusion) + trained(pose) + trained(target),
    )


def flops_of(jaxpr: core.Jaxpr) -> int:
    """Of the products and convolutions of a traced program that its results need (padding multiplied too), loops of known length
    unrolled. Of a branch the longest is counted, of a loop of unknown length one round, of a Pallas kernel nothing."""
    total, needed = 0, set(map(id, jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if needed.isdisjoint(map(id, eqn.outvars)):
            continue
        needed |= set(map(id, eqn.invars))
        name, inner = eqn.primitive.name, [flops_of(sub) for sub in inner_jaxprs(eqn.params)]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
        elif name == "cond":
            total += max(inner)
        elif name != "pallas_call":
            total += sum(inner) * eqn.params.get("length", 1)
    return total


def is_counted(config: Config) -> bool:
    """Whether `model_flops` knows the modules: TruePose's, but not the ablations', which are others, nor the half-cell head's."""
    return config.model.method == "truepose" and config.model.fusion.is_whole and not config.model.carry.head


def peak_flops(device_kind: str) -> float | None:
    """The dense bf16 peak of a chip by jax.Device.device_kind; None where it is not in the table (a CPU)."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)


def utilisation(flops: float, seconds: float, device_kind: str, *, devices: int = 1) -> float | None:
    """MFU: model FLOPs of a step over what `devices` chips could do in its time; None without a known peak."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops / seconds / (peak * devices)


def mfu_per_image_rate(config: Config, device_kind: str, devices: int) -> float | None:
    """What a training run's images a second are multiplied by to give its MFU on `devices` chips.

    None where it is not known: a chip without a peak in the table (a CPU), a network that is not counted, or an
    optim.trainable other than ".*" or adapters, with which some gradients are not computed.
    """
    whole = config.optim.trainable == ".*" and not config.optim.lora.rank
    if not whole or not is_counted(config) or peak_flops(device_kind) is None:
        return None
    return utilisation(model_flops(config).train, 1.0, device_kind, devices=devices)


def _sum(parts: list[Part]) -> int:
    return sum(part.forward for part in parts)


def _dense(rows: int, width_in: int, width_out: int) -> int:
    return 2 * rows * width_in * width_out


def _conv(cells: int, width_in: int, width_out: int, kernel: int = 3) -> int:
    return 2 * cells * kernel * kernel * width_in * width_out


def _products(queries: int, keys: int, width: int) -> int:
    """q k^T and its softmax times v over all heads, which together are `width` wide."""
    return 4 * queries * keys * width


def _unet(c: UNetConfig, h: int, w: int, block) -> Iterator[Part]:
    """Parts in the order in which they run; block(cells, width, heads) gives those of a transformer block."""
    levels, widths = len(c.block_out_channels), c.block_out_channels
    cells = [-(-h // 2**i) * -(-w // 2**i) for i in range(levels)]
    time = 4 * widths[0]
    yield Part("time_embedding.linear_1", _dense(1, widths[0], time), 2)
    yield Part("time_embedding.linear_2", _dense(1, time, time))
    yield Part("conv_in", _conv(cells[0], c.in_channels, widths[0]), 2)

    def resnet(name: str, level: int, width_in: int) -> Iterator[Part]:
        width = widths[level]
        yield Part(f"{name}.conv1", _conv(cells[level], width_in, width))
        yield Part(f"{name}.time_emb_proj", _dense(1, time, width))
        yield Part(f"{name}.conv2", _conv(cells[level], width, width))
        if width_in != width:
            yield Part(f"{name}.conv_shortcut", _conv(cells[level], width_in, width, 1))

    def transformer(name: str, level: int) -> Iterator[Part]:
        projection = _dense(cells[level], widths[level], widths[level])
        yield Part(f"{name}.proj_in", projection)
        for _ in range(c.transformer_layers_per_block):
            yield Part(f"{name}.tap", 0)
            yield from block(cells[level], widths[level], c.heads[level])
        yield Part(f"{name}.proj_out", projection)

    x, skips = widths[0], [widths[0]]
    for i, kind in enumerate(c.down_block_types):
        for j in range(c.layers_per_block):
            yield from resnet(f"down_blocks.{i}.resnets.{j}", i, x)
            if kind == "CrossAttnDownBlock2D":
                yield from transformer(f"down_blocks.{i}.attentions.{j}", i)
            x = widths[i]
            skips.append(x)
        if i + 1 < levels:
            yield Part(f"down_blocks.{i}.downsamplers.0", _conv(cells[i + 1], x, x))
            skips.append(x)
    yield from resnet("mid_block.resnets.0", levels - 1, x)
    yield from transformer("mid_block.attentions.0", levels - 1)
    yield from resnet("mid_block.resnets.1", levels - 1, widths[-1])
    x = widths[-1]
    for i, kind in enumerate(c.up_block_types):
        level = levels - 1 - i
        for j in range(c.layers_per_block + 1):
            yield from resnet(f"up_blocks.{i}.resnets.{j}", level, x + skips.pop())
            if kind == "CrossAttnUpBlock2D":
                yield from transformer(f"up_blocks.{i}.attentions.{j}", level)
            x = widths[level]
        if level:
            yield Part(f"up_blocks.{i}.upsamplers.0", _conv(cells[level - 1], x, x))
    yield Part("conv_out", _conv(cells[0], x, c.out_channels))


def _self_attention(n: int, c: int) -> Iterator[Part]:
    yield Part("attn1", 4 * _dense(n, c, c) + _products(n, n, c))


def _feed_forward(n: int, c: int) -> Iterator[Part]:
    yield Part("ff", _dense(n, c, 8 * c) + _dense(n, 4 * c, c))


def _latents(config: Config) -> tuple[int, int, int]:
    """Pixels per cell and side, and the cells of a picture's latent."""
    factor, (height, width) = config.model.latent_factor, config.model.size
    return factor, height // factor, width // factor


def source_parts(config: Config) -> list[Part]:
    """SourceNet's, up to its last tap, and the parsing encoder's."""
    unet = config.model.unet
    _, h, w = _latents(config)

    def block(n: int, c: int, heads: int) -> Iterator[Part]:
        yield from _self_attention(n, c)
        yield Part("attn2.to_q", _dense(n, c, c), 1)
        yield Part("attn2.to_k", _dense(1, unet.cross_attention_dim, c), 1)
        yield Part("attn2.to_v", _dense(1, unet.cross_attention_dim, c), 2)
        yield Part("attn2.products", _products(n, 1, c), 1)
        yield Part("attn2.to_out", _dense(n, c, c))
        yield from _feed_forward(n, c)

    parts = list(_unet(unet, h, w, block))
    last = max(i for i, part in enumerate(parts) if part.name.endswith(".tap"))
    found = parts[:last]
    if config.model.source_parsing == "coverage":
        found.append(Part("parsing_encoder", _dense(h * w, MAX_CLASSES, unet.block_out_channels[0]), 2))
    return found


def _target_block(config: Config):
    fusion, unet = config.model.fusion, config.model.unet
    regions = fusion.regions

    def block(n: int, c: int, heads: int) -> Iterator[Part]:
        yield from _self_attention(n, c)
        yield Part("hpfa", 2 * _dense(n, c, c) + _products(n, n, c))
        if fusion.carry_latents:
            carried = heads * unet.in_channels
            yield Part("hpfa latents", 2 * n * n * carried, 2)
            yield Part("hpfa latents to_out", _dense(n, carried, c))
        yield Part("caa", 2 * _dense(n, c, c) + _products(n, regions, c))
        yield from _feed_forward(n, c)

    return block


def _null_block(config: Config):
    """HPFA and CAA of a dropped source are the biases of their last layers."""
    del config

    def block(n: int, c: int, heads: int) -> Iterator[Part]:
        yield from _self_attention(n, c)
        yield from _feed_forward(n, c)

    return block


def _fusion(config: Config, h: int, w: int) -> Iterator[Part]:
    tokens, regions = config.model.unet.cross_attention_dim, config.model.fusion.regions
    for site in config.model.unet.sites:
        n, c = -(-h // 2**site.level) * -(-w // 2**site.level), site.channels
        yield Part("hpfa source", 5 * _dense(n, c, c) + _products(n, n, c))
        # The choice of regions: each cell's key against the mean query, averaged over each class's cells. No gradient.
        yield Part("caa scores", _dense(n, c, 1) + _dense(MAX_CLASSES, n, 1), 1)
        yield Part("caa source", 2 * _dense(regions, tokens, c), 2)


def _pose_encoder(config: Config, factor: int, h: int, w: int) -> Iterator[Part]:
    widths = (3, *HIDDEN)
    shrunk = factor
    for i in range(len(HIDDEN)):
        shrunk = max(shrunk // 2, 1)
        yield Part(f"conv_{i}", _conv(h * w * shrunk * shrunk, widths[i], widths[i + 1]), 3 if i else 2)
    yield Part("conv_out", _conv(h * w, HIDDEN[-1], config.model.unet.block_out_channels[0]))
