"""One comparison for every module: same random weights in torch and here, then outputs and all gradients.

NCHW exists only on torch's side of this file. Weights and gradients cross by the project's own converter.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from truepose_jax.pretrained.conversion import from_torch, key_maps

MODULE = 1e-5
NETWORK = 3e-5
"""Tolerances on max|difference| / max|reference| per tensor, of a single module and of a whole network.

Measured maxima (CPU, torch 2.13, jax 0.10.2) of outputs and of gradients: layers 4.4e-7, 1.1e-6; UNet 8.9e-7,
8.9e-6; AutoencoderKL 6.0e-7, 2.7e-6; CLIP 6.6e-7, 1.3e-6. The factor above them is for other machines' rounding.
A wrong epsilon of a norm would move as little: those are compared by value (`epsilons`).
"""

PLAIN = key_maps.ModelKeys(title="torch module")


class Measured(NamedTuple):
    forward: float
    gradient: float
    worst: str


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, zero-initialised ones too: norm weights about 1, the others of unit gain."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(p.shape, dtype=np.float32))
            if p.ndim > 1:
                p.copy_(noise / np.sqrt(p[0].numel()))
            else:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    """NHWC images to NCHW, anything else as it is; floats ask for their gradient."""
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x
    return torch.from_numpy(x.copy()).requires_grad_(x.dtype == np.float32)


def from_nchw(x: torch.Tensor) -> np.ndarray:
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def params_of(module: torch.nn.Module, shapes, keys=PLAIN):
    """The torch module's parameters as our tree, by the strict converter."""
    return from_torch.load({k: v.detach().numpy() for k, v in module.state_dict().items()}, shapes, keys)


def epsilons(module: nn.Module, *inputs) -> tuple[dict[str, float], dict]:
    """({torch's name of the norm: its epsilon}, the parameters as shapes), of one trace of the module's init."""
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.GroupNorm | nn.LayerNorm):
            path = "/".join([*context.module.path, "scale"])
            found[key_maps.torch_name(path).removesuffix(".weight")] = context.module.epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    return found, shapes


def torch_epsilons(module: torch.nn.Module) -> dict[str, float]:
    kinds = torch.nn.GroupNorm | torch.nn.LayerNorm
    return {name: m.eps for name, m in module.named_modules() if isinstance(m, kinds)}


def difference(ours, reference) -> float:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(ours).all() and np.isfinite(reference).all()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def check(
    reference: torch.nn.Module,
    call_torch: Callable,
    ours,
    inputs: list[np.ndarray],
    *,
    call_ours: Callable | None = None,
    keys: key_maps.ModelKeys = PLAIN,
    zero_gradients: str = "(?!)",
    tolerance: float = MODULE,
    seed: int = 0,
) -> Measured:
    """Compares outputs, and the gradient of sum(output * noise) by every parameter and floating input.

    call_torch(module, *tensors), call_ours(apply, *arrays) -> one array or a tuple; `apply` is the Linen
    module's apply with the parameters bound. inputs are NHWC. zero_gradients: parameters whose exact gradient
    is zero (a bias of the keys moves every logit of a row alike), compared against the largest gradient.
    """
    torch.set_num_threads(1)
    call_ours = call_ours or (lambda apply, *x: apply(*x))
    randomise(reference, seed)
    shapes = jax.eval_shape(lambda: call_ours(lambda *x, **k: ours.init(jax.random.key(0), *x, **k)["params"], *inputs))
    params = params_of(reference, shapes, keys)

    tensors = [to_torch(x) for x in inputs]
    expected = call_torch(reference, *tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    weights = [normal(90 + i, *from_nchw(y).shape) for i, y in enumerate(expected)]
    sum((y * to_torch(w).detach()).sum() for y, w in zip(expected, weights, strict=True)).backward()
    gradients = {
        k: np.zeros(v.shape, np.float32) if v.grad is None else v.grad.numpy() for k, v in reference.named_parameters()
    }
    expected_grads = dict(key_maps.leaves(from_torch.load(gradients, shapes, keys)))
    floating = [i for i, x in enumerate(inputs) if x.dtype == np.float32]

    def loss(params, moving):
        full = list(inputs)
        for i, x in zip(floating, moving, strict=True):
            full[i] = x
        out = call_ours(lambda *x, **k: ours.apply({"params": params}, *x, **k), *full)
        out = out if isinstance(out, tuple) else (out,)
        return sum(jnp.sum(y * w) for y, w in zip(out, weights, strict=True)), out

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, input_grads), out = step(params, [jnp.asarray(inputs[i]) for i in floating])

    forward = max(difference(y, from_nchw(r)) for y, r in zip(out, expected, strict=True))
    largest = max(np.abs(g).max() for g in expected_grads.values())
    found = {}
    for path, g in key_maps.leaves(grads):
        if re.search(zero_gradients, path):
            found[path] = float(np.abs(np.asarray(g) - expected_grads[path]).max() / largest)
            assert np.abs(expected_grads[path]).max() < 1e-5 * largest, f"{path} has a gradient"
        else:
            assert np.abs(expected_grads[path]).max() > 1e-6 * largest, f"{path} has no gradient in the reference"
            found[path] = difference(g, expected_grads[path])
    for i, g in zip(floating, input_grads, strict=True):
        found[f"input {i}"] = difference(g, from_nchw(tensors[i].grad))
    worst = max(found, key=found.get)
    measured = Measured(forward, found[worst], worst)
    print(f"\nparity {type(reference).__name__}: {measured}")
    assert forward < tolerance, measured
    assert found[worst] < tolerance, measured
    return measured
