"""What FPDM and IMAGPose add to the UNet against strangers' code: diffusers' UNet with its class embedding and hooks, its own
temporal transformer; and small NumPy and torch forms of the rest. Every parameter random."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

from tests import tiny
from tests.parity.compare import NETWORK, check, difference, normal
from tests.parity.test_unet import CROSS, PLAIN, config_of
from truepose_jax.models import fpdm, imagpose
from truepose_jax.models.attention import plain_block
from truepose_jax.models.context import ContextSide, context_block
from truepose_jax.models.pose_encoder import ControlNetPoseEncoder
from truepose_jax.models.unet import UNet2DCondition
from truepose_jax.pretrained.conversion import key_maps

SMALL = config_of((PLAIN[0], CROSS[1]), block_out_channels=(16,), attention_head_dim=2, use_linear_projection=True)


class PerFrame(torch.nn.GroupNorm):
    """AnimateDiff's own norm is over one frame; diffusers' goes over all frames together."""

    def forward(self, x):
        b, c, frames, h, w = x.shape
        found = super().forward(x.transpose(1, 2).reshape(b * frames, c, h, w))
        return found.reshape(b, frames, c, h, w).transpose(1, 2)


class TorchCVA(torch.nn.Module):
    """Tiles to frames, diffusers' temporal transformer, and back."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.temporal_transformer = AnimateDiffTransformer3D(
            num_attention_heads=8,
            attention_head_dim=channels // 8,
            in_channels=channels,
            norm_num_groups=groups,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=32,
        )
        self.temporal_transformer.norm = PerFrame(groups, channels, eps=1e-6)

    def forward(self, canvas):
        b, c, h, w = canvas.shape
        rows = canvas.reshape(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5)
        frames = rows.reshape(b * 4, c, h // 2, w // 2)
        found = self.temporal_transformer(frames, num_frames=4).reshape(b, 2, 2, c, h // 2, w // 2)
        return found.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


_BLOCK = r"(.*temporal_transformer\.transformer_blocks\.0)"
CVA_KEYS = key_maps.ModelKeys(
    title="temporal transformer of diffusers",
    aliases=(
        (rf"^{_BLOCK}\.norm1\.", r"\1.norms.0."),
        (rf"^{_BLOCK}\.norm2\.", r"\1.norms.1."),
        (rf"^{_BLOCK}\.norm3\.", r"\1.ff_norm."),
        (rf"^{_BLOCK}\.attn1\.", r"\1.attention_blocks.0."),
        (rf"^{_BLOCK}\.attn2\.", r"\1.attention_blocks.1."),
    ),
    ignored=((r".*pos_embed\.pe", "a constant"),),
)


def test_the_unet_with_all_that_is_added():
    """FPDM's class embedding of type "identity" and features on conv_in's output; IMAGPose's CVA after every layer, by forward
    hooks on the last module of each: down, up and in the middle, 4 places of this one."""
    fields = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    reference = UNet2DConditionModel(**fields, class_embed_type="identity")
    places = []
    for block in (*reference.down_blocks, *reference.up_blocks):
        layers = getattr(block, "attentions", None) or block.resnets
        block.motion_modules = torch.nn.ModuleList(TorchCVA(16, 8) for _ in layers)
        places += zip(layers, block.motion_modules, strict=True)
    reference.mid_block.motion_modules = torch.nn.ModuleList([TorchCVA(16, 8)])
    places.append((reference.mid_block.attentions[0], reference.mid_block.motion_modules[0]))
    assert len(places) == 4

    def hooked(motion):
        return lambda module, inputs, out: (motion(out[0]),) if isinstance(out, tuple) else motion(out)

    for layer, motion in places:
        layer.register_forward_hook(hooked(motion))

    def call_torch(unet, x, t, context, pose, after_time):
        hook = unet.conv_in.register_forward_hook(lambda module, inputs, output: output + pose)
        found = unet(x, t, context, class_labels=after_time, return_dict=False)[0]
        hook.remove()
        return found

    def call_ours(apply, x, t, context, pose, after_time):
        found = apply(x, t, context, after_conv_in=pose, after_time=after_time)
        return found[0] if isinstance(found, tuple) else found

    def after(site, *, name):
        return imagpose.CrossViewAttention(8, name=name)

    inputs = [normal(1, 2, 6, 4, 4), np.array([3, 981], np.int32), normal(2, 2, 3, 24), normal(3, 2, 6, 4, 16)]
    check(
        reference,
        call_torch,
        UNet2DCondition(SMALL, plain_block, after),
        [*inputs, normal(4, 2, 64)],
        call_ours=call_ours,
        keys=CVA_KEYS,
        tolerance=NETWORK,
    )


def test_keys_and_values_outside_of_the_unet_are_those_inside():
    """Output and gradients of the cut UNet with its context side against the plain one, which is diffusers' (test_unet.py)."""
    config = dataclasses.replace(SMALL, layers_per_block=0)
    plain, cut, side = UNet2DCondition(config, plain_block), UNet2DCondition(config, context_block), ContextSide(config)
    x, t, tokens = normal(1, 2, 6, 4, 4), np.array([3, 981], np.int32), normal(2, 2, 5, 24)
    params = tiny.randomise(jax.eval_shape(lambda: plain.init(jax.random.key(0), x, t, tokens)["params"]), 1)
    flat = dict(key_maps.leaves(params))
    context, rest = {}, {}
    for path, leaf in flat.items():
        block, attn2, name = path.partition("/attn2/to_")
        of_context = attn2 and name[0] in "kv"
        (context if of_context else rest)[f"{block.replace('/', '_')}{attn2}{name}" if of_context else path] = leaf

    def whole(flat, x, tokens):
        return jnp.sum(plain.apply({"params": key_maps.nest(flat)}, x, t, tokens)[0] * normal(3, 2, 6, 4, 4))

    def in_two(context, rest, x, tokens):
        sites = side.apply({"params": key_maps.nest(context)}, tokens)
        out, _ = cut.apply({"params": key_maps.nest(rest)}, x, t, None, features=sites)
        return jnp.sum(out * normal(3, 2, 6, 4, 4))

    want, (by_params, *by_inputs) = tiny.jit(jax.value_and_grad(whole, (0, 1, 2)))(flat, x, tokens)
    got, (by_context, by_rest, *others) = tiny.jit(jax.value_and_grad(in_two, (0, 1, 2, 3)))(context, rest, x, tokens)
    assert abs(got - want) < 1e-5 * abs(want)
    found = dict(by_rest) | {path: by_context[new] for path, new in zip_names(flat)}
    assert found.keys() == flat.keys()
    tiny.check_gradients([found[path] for path in flat], [by_params[path] for path in flat])
    tiny.check_gradients(others, by_inputs)


def zip_names(flat):
    """(path in the plain UNet, path in the context side) of every attn2's keys and values."""
    for path in flat:
        block, attn2, name = path.partition("/attn2/to_")
        if attn2 and name[0] in "kv":
            yield path, f"{block.replace('/', '_')}{attn2}{name}"


class TorchPoseEncoder(torch.nn.Module):
    """ControlNet's conditioning embedding, of three halvings or fewer."""

    def __init__(self, features: int, widths: tuple[int, ...], halvings: int):
        super().__init__()
        conv = lambda a, b, stride=1: torch.nn.Conv2d(a, b, 3, stride, 1)  # noqa: E731
        self.conv_in = conv(3, widths[0])
        self.blocks = torch.nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            self.blocks += [conv(a, a), conv(a, b, 2 if i < halvings else 1)]
        self.conv_out = conv(widths[-1], features)

    def forward(self, x):
        x = torch.nn.functional.silu(self.conv_in(x))
        for block in self.blocks:
            x = torch.nn.functional.silu(block(x))
        return self.conv_out(x)


@pytest.mark.parametrize("stride", [8, 2])
def test_controlnets_pose_encoder(stride):
    widths = (4, 6, 8, 10)
    reference = TorchPoseEncoder(5, widths, {8: 3, 2: 1}[stride])
    check(reference, lambda m, x: m(x), ControlNetPoseEncoder(5, stride, widths), [normal(1, 1, 16, 8, 3)])


class TorchCombiner(torch.nn.Module):
    """FPDM's, in evaluation mode, under its names."""

    def __init__(self, e: int):
        super().__init__()
        for name, width in (("kpt_projection", e), ("image_projection", e), ("combiner", 2 * e), ("output", e)):
            setattr(self, f"{name}_layer", torch.nn.Linear(width, e))
        relu, drop = torch.nn.ReLU(), torch.nn.Dropout(0.5)
        linear = torch.nn.Linear
        self.dynamic_scalar = torch.nn.Sequential(linear(2 * e, e), relu, drop, linear(e, 1), torch.nn.Sigmoid())

    def forward(self, pose, image):
        relu = torch.relu
        both = torch.cat([relu(self.kpt_projection_layer(pose)), relu(self.image_projection_layer(image))], -1)
        gate = self.dynamic_scalar(both)
        found = self.output_layer(relu(self.combiner_layer(both))) + gate * pose + (1 - gate) * image
        return torch.nn.functional.normalize(found, dim=-1)


def test_combiner():
    check(TorchCombiner(12), lambda m, p, i: m(p, i), fpdm.Combiner(), [normal(1, 3, 12), normal(2, 3, 12)])


def test_spf_loss_and_its_gradient():
    """Against torch's cross entropy, with one row that is not there."""
    target, fused, source = (normal(i, 5, 12) for i in range(3))
    valid = np.array([1, 1, 0, 1, 1], np.float32)
    there = valid > 0
    tensors = [torch.from_numpy(x[there].copy()).requires_grad_() for x in (target, fused, source)]
    t, f, s = tensors
    rows, columns = torch.cat([t, s]), torch.cat([f, s])
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], columns[None], dim=-1) / 0.07
    want = torch.nn.functional.cross_entropy(cosine, torch.arange(len(rows)))
    want = want + 0.3 * torch.mean(torch.abs(torch.cat([s, s]) - columns))
    want.backward()

    def loss(target, fused, source):
        return fpdm.spf_loss(target, fused, source, valid, temperature=0.07, raw=0.3)[0]

    got, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(target, fused, source)
    assert abs(got - want.item()) < 1e-5 * want.item()
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert difference(gradient[there], tensor.grad.numpy()) < 1e-5
        assert not np.any(np.asarray(gradient)[~there])


def test_tiles_lie_in_reading_order():
    views = normal(1, 2, 4, 3, 5, 2)
    canvas = np.asarray(imagpose.tile(views))
    for i, (top, left) in enumerate(((0, 0), (0, 5), (3, 0), (3, 5))):
        np.testing.assert_array_equal(canvas[:, top : top + 3, left : left + 5], views[:, i])
    np.testing.assert_array_equal(imagpose.untile(canvas), views)


def test_texture_tokens_are_products_of_patches():
    latents = normal(1, 1, 4, 6, 3)
    module = imagpose.TextureTokens(7, patch=2)
    params = module.init(jax.random.key(0), latents)["params"]["proj"]
    found = module.apply({"params": {"proj": params}}, latents)
    patches = latents.reshape(2, 2, 3, 2, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1)
    want = patches @ np.asarray(params["kernel"]).reshape(-1, 7) + params["bias"]
    np.testing.assert_allclose(found[0], want, rtol=1e-5, atol=1e-5)
