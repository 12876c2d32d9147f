"""The half-cell head: carries the source's pixels to where the target pose needs them, at half of the latent's cells.

What HPFA does at 8x8 pixels a cell, this does at 4x4, after TargetNet's last block: one softmax over the source's half cells,
whose logits add up three things: like content, the same place of the same limb (models/limbs.py), and whether the source
shows there what the target's predicted parsing expects. With limb_warp the source's pixels are also moved limb by limb, as the
joints alone say, and mixed with what the softmax carries by a predicted share: it places prints to the pixel, where the
softmax finds what the joints cannot tell. The person is composed with the source's empty studio by a predicted alpha, and
added to TargetNet's x0 through a gate per channel. Ours, not the paper's; pixels that move limb by limb are Deformable GANs'
(Siarohin et al. 2018).

It needs latents that are patches of pixels (models/patch_codec.py) and a plain studio behind the person.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from truepose_jax.models.attention import layer_norm
from truepose_jax.models.hpfa import LIMB_WIDTH, attention_account, attention_of_widths, unit
from truepose_jax.models.layers import ResnetBlock2D, conv3x3, group_norm
from truepose_jax.models.limbs import Limbs, limb_positions
from truepose_jax.models.masks import coverage_levels
from truepose_jax.models.patch_codec import PATCH, PatchAutoencoder
from truepose_jax.models.vae import depth_to_space, space_to_depth

CONTENT = 24
"""Width of the content queries and keys, and of the features that are carried beside the latents."""

GROUPS = 8
OPEN_GATE = 2.5
"""Added to the gates' logits: at birth 92 % of what is carried comes through."""

CONTENT_LOGIT, LIMB_LOGIT, PARSING_LOGIT = 7.4, 13.5, 6.05
"""Logits of full agreement at birth."""

STUDIO_BLURS = ((1.0, 1.2, 4.0), (1e-3, 3.0, 12.0), (1e-6, 15.0, 15.0))
"""(weight, rows, columns) of the Gaussians, in half cells, that fill in the studio; wider ones count where no other reaches."""


@dataclasses.dataclass(frozen=True)
class CarryConfig:
    """head: whether there is the half-cell head, with limb coordinates for it and for every HPFA. width: of its features.
    limb_warp: whether it is given the source moved limb by limb too."""

    head: bool = False
    width: int = 40
    limb_warp: bool = False

    def __post_init__(self):
        if self.width < GROUPS or self.width % GROUPS:
            raise ValueError(f"width is {self.width}; it must be a multiple of {GROUPS}")
        if self.limb_warp and not self.head:
            raise ValueError("limb_warp is of the half-cell head: it needs head")


class Moved(NamedTuple):
    """The source moved limb by limb: its latents [b h w c] and the share of each half cell that every class covers [b n p]."""

    latents: Array
    coverage: Array


@flax.struct.dataclass
class CarrySide:
    """What the head reads, all independent of t: keys [b m .] and values [b m .] of the source's half cells, the studio [b h w c]
    behind the person, the target's limb queries [b n .] and limb context [b n .], which keys are person [b m], and the source
    moved limb by limb where the head is given it."""

    keys: Array
    values: Array
    studio: Array
    limb_queries: Array
    context: Array
    person: Array
    moved: Moved | None = None

    def dropped(self, keep: Float[Array, " b"] | None) -> CarrySide:
        """Nothing of the source is left in rows whose keep is 0 (None: in all)."""

        def kept(x):
            return x * (jnp.zeros(()) if keep is None else keep.reshape(-1, *[1] * (x.ndim - 1)))

        return self.replace(values=kept(self.values), studio=kept(self.studio), moved=jax.tree.map(kept, self.moved))


class Carried(NamedTuple):
    """x0 [b h w c] (half cells) to add to TargetNet's; warp [b h w c]: the source's latents as carried; composite: with the
    studio behind; parsing [b n p] and alpha [b h w 16] as logits, a row of pixels after the other; account: of the softmax."""

    x0: Array
    warp: Array
    composite: Array
    parsing: Array
    alpha: Array
    account: Mapping[str, Array]


class _Trunk(nn.Module):
    """Features of half cells [b h w width]: from a UNet's last hidden state, the latents and the limb context."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: Float[Array, "b hh ww e"] | None, latents: Float[Array, "b h w c"], context):
        x = conv3x3(self.width, self.dtype, "latents_in")(latents)
        if hidden is not None:
            x = x + depth_to_space(nn.Dense(4 * self.width, dtype=self.dtype, name="hidden_in")(hidden), 2)
        x = x + nn.Dense(self.width, dtype=self.dtype, name="limbs_in")(context).reshape(x.shape)
        return ResnetBlock2D(self.width, GROUPS, dtype=self.dtype, name="resnet")(x)


class CarrySource(nn.Module):
    """The source's side, once per picture."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "s hh ww e"] | None,
        latents: Float[Array, "s h w c"],
        coverage: Float[Array, "s n p"],
        source: Limbs,
        target: Limbs,
        keep: Float[Array, " b"] | None = None,
        moved: Moved | None = None,
    ) -> CarrySide:
        """hidden: of SourceNet (None: there is none, ablation B1). latents: half cells. coverage: share of each half cell that
        every class covers, 0 background. source, target: one row a source, one a target; sources repeat for their targets."""
        s, h, w, c = latents.shape
        x = _Trunk(self.width, self.dtype, name="trunk")(hidden, latents, source.context)
        x = layer_norm(self.dtype, "norm")(x.reshape(s, h * w, -1))
        content = unit(nn.Dense(CONTENT, use_bias=False, dtype=self.dtype, name="to_k")(x))
        features = nn.Dense(CONTENT, use_bias=False, dtype=self.dtype, name="to_v")(x)
        project = nn.Dense(LIMB_WIDTH, use_bias=False, dtype=self.dtype, name="limbs")
        limb_keys, limb_queries = (unit(project(limbs.features)) for limbs in (source, target))
        background = coverage[..., :1]
        each = functools.partial(jnp.repeat, repeats=len(limb_queries) // s, axis=0)
        side = CarrySide(
            keys=each(jnp.concatenate([content, limb_keys, -background, coverage[..., 1:]], axis=-1)),
            values=each(jnp.concatenate([latents.reshape(s, h * w, c), features], axis=-1)),
            studio=each(studio(latents, background.reshape(s, h, w, 1))),
            limb_queries=limb_queries,
            context=target.context,
            person=each(background[..., 0] < 0.5),
            moved=moved,
        )
        return side if keep is None else side.dropped(keep)


class CarryTarget(nn.Module):
    """The target's side, at every step. classes: of the predicted parsing, 0 the background."""

    width: int
    codec: PatchAutoencoder
    classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: Float[Array, "b hh ww e"], x_t: Float[Array, "b h w c"], side: CarrySide) -> Carried:
        """hidden: of TargetNet. x_t: noisy latents, half cells."""
        b, h, w, c = x_t.shape
        context, moved = side.context, side.moved
        if moved is not None:
            context = jnp.concatenate([context, moved.latents.reshape(b, h * w, c), moved.coverage], axis=-1)
        trunk = _Trunk(self.width, self.dtype, name="trunk")(hidden, x_t, context)
        normed = layer_norm(self.dtype, "norm")(trunk.reshape(b, h * w, -1))
        content = unit(nn.Dense(CONTENT, use_bias=False, dtype=self.dtype, name="to_q")(normed))

        expected = ResnetBlock2D(self.width, GROUPS, dtype=self.dtype, name="parsing_resnet")(trunk)
        parsing = nn.Dense(self.classes, dtype=self.dtype, name="parsing_out")(expected.reshape(b, h * w, -1))
        outline = nn.silu(group_norm(GROUPS, 1e-5, self.dtype, "alpha_norm")(expected))
        alpha_logits = nn.Dense(PATCH**2, dtype=self.dtype, name="alpha_out")(outline)
        # Against a key's background its own share speaks, whatever class is expected.
        worn = jnp.concatenate([jnp.ones((b, h * w, 1)), nn.softmax(parsing[..., 1:])], axis=-1)

        parts = ((content, CONTENT_LOGIT), (side.limb_queries, LIMB_LOGIT), (worn, PARSING_LOGIT))
        scales = [
            jnp.exp(self.param(name, lambda _, at=at: jnp.full((1,), jnp.log(at), jnp.float32)))
            for name, (_, at) in zip(("content_scale", "limb_scale", "parsing_scale"), parts, strict=True)
        ]
        q = jnp.concatenate([x * scale for (x, _), scale in zip(parts, scales, strict=True)], axis=-1)
        q, k, v = (x[:, :, None].astype(self.dtype) for x in (q, side.keys, side.values))
        found = attention_of_widths(q, k, v).reshape(b, h, w, -1)

        warp, alpha = found[..., :c], nn.sigmoid(alpha_logits)
        expects, person = nn.softmax(parsing), warp
        if moved is not None:
            fits = jnp.sum(expects * moved.coverage, axis=-1).reshape(b, h, w, 1)
            told = jnp.concatenate([trunk, found, moved.latents, fits], axis=-1)
            share = nn.sigmoid(nn.Dense(c, dtype=self.dtype, name="limb_share")(told))
            person = warp + share * (moved.latents - warp)
        composite = compose(self.codec, person, side.studio, alpha)
        seen = [trunk, found, composite, alpha, expects.reshape(b, h, w, -1)]
        y = nn.Dense(self.width, dtype=self.dtype, name="join")(jnp.concatenate(seen, axis=-1))
        y = ResnetBlock2D(self.width, GROUPS, dtype=self.dtype, name="out_resnet")(y)
        y = nn.silu(group_norm(GROUPS, 1e-5, self.dtype, "out_norm")(y))
        residual, gate = jnp.split(conv3x3(2 * c, self.dtype, "out", zero_init=True)(y), 2, axis=-1)
        x0 = residual + nn.sigmoid(gate + OPEN_GATE) * composite
        account = attention_account(q, k, side.person)
        return Carried(x0, warp, composite, parsing, alpha_logits, account)


def compose(
    codec: PatchAutoencoder,
    person: Float[Array, "b h w c"],
    behind: Float[Array, "b h w c"],
    alpha: Float[Array, "b h w 16"],
) -> Float[Array, "b h w c"]:
    """alpha person + (1 - alpha) behind, in the pixels of each half cell, and back to latents."""

    def pixels(latents):
        return codec.to_pixels(latents).reshape(*latents.shape[:3], PATCH**2, 3)

    mixed = pixels(behind) + alpha[..., None] * (pixels(person) - pixels(behind))
    return codec.to_patches(mixed.reshape(*mixed.shape[:3], -1))


def move_limbs(
    codec: PatchAutoencoder,
    latents: Float[Array, "s h w c"],
    parsing: UInt8[Array, "s H W"],
    source: Float[Array, "s 18 3"],
    target: Float[Array, "b 18 3"],
    *,
    classes: int,
) -> Moved:
    """The source (half cells) where the target's joints put it, pixel by pixel (models/limbs.py, limb_positions); sources
    repeat for their targets. Classes by the nearest pixel, colours by the four about."""
    latents, parsing, source = (jnp.repeat(x, len(target) // len(x), axis=0) for x in (latents, parsing, source))
    b, height, width = parsing.shape
    at = limb_positions(source, target, image_hw=(height, width)) - 0.5
    last = np.array([width - 1, height - 1], np.float32)
    at = jnp.clip(at, 0.0, last)
    low = jnp.minimum(jnp.floor(at), last - 1)
    across, down = jnp.split(at - low, 2, axis=-1)
    x, y = jnp.moveaxis(low.astype(jnp.int32), -1, 0)

    def pick(image, x, y):
        return jax.vmap(lambda image, x, y: image[y, x])(image, x, y)

    picture = depth_to_space(codec.to_pixels(latents), PATCH)
    above, below = ((1 - across) * pick(picture, x, row) + across * pick(picture, x + 1, row) for row in (y, y + 1))
    moved = space_to_depth((1 - down) * above + down * below, PATCH)
    x, y = jnp.moveaxis(jnp.round(at).astype(jnp.int32), -1, 0)
    (coverage,) = coverage_levels(pick(parsing, x, y), num_classes=classes, factor=PATCH, levels=1)
    return Moved(codec.to_patches(moved), coverage.reshape(b, -1, classes))


def studio(latents: Float[Array, "b h w c"], background: Float[Array, "b h w 1"]) -> Float[Array, "b h w c"]:
    """The scene without the person: every half cell from those about it that hold none, along the row first."""
    free = jnp.exp(20.0 * (background - 1.0))
    weighted = jnp.concatenate([free * latents, free], axis=-1)
    h, w = latents.shape[1:3]
    total = sum(
        weight * jnp.einsum("yr,xs,brsc->byxc", _gaussian(h, rows), _gaussian(w, columns), weighted)
        for weight, rows, columns in STUDIO_BLURS
    )
    return total[..., :-1] / (total[..., -1:] + 1e-9)


def _gaussian(n: int, sigma: float) -> Float[np.ndarray, "n n"]:
    i = np.arange(n, dtype=np.float32)
    return np.exp(-((i[:, None] - i[None]) ** 2) / (2.0 * sigma**2)).astype(np.float32)


def half_cells(latents: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c/4"]:
    """A patch codec's latents, one patch a cell."""
    return depth_to_space(latents, 2)


def whole_cells(halves: Float[Array, "b 2h 2w c"]) -> Float[Array, "b h w 4c"]:
    """The inverse of half_cells."""
    return space_to_depth(halves, 2)


def carry_losses(
    carried: Carried, x0: Float[Array, "b h w c"], parsing: UInt8[Array, "b H W"], coverage: Float[Array, "b n p"]
) -> dict[str, Float[Array, " b"]]:
    """Per sample: "flow", how far what is carried lies from the target's latents x0 (half cells) on the person's cells; and
    "parsing", cross-entropy of the predicted parsing plus three times alpha's. parsing, coverage: of the target."""
    person = jnp.square(1.0 - coverage[..., 0])
    errors = jnp.mean(jnp.square(carried.warp - x0), axis=-1).reshape(person.shape)
    flow = jnp.sum(errors * person, axis=1) / (jnp.sum(person, axis=1) + 1.0)
    classes = -jnp.mean(jnp.sum(coverage * jax.nn.log_softmax(carried.parsing), axis=-1), axis=1)
    inside = space_to_depth((parsing > 0).astype(jnp.float32)[..., None], PATCH)
    logits = carried.alpha
    outline = jnp.maximum(logits, 0.0) - logits * inside + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return {"flow": flow, "parsing": classes + 3.0 * jnp.mean(outline, axis=(1, 2, 3))}
