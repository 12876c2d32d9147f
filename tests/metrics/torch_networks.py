"""AlexNet with LPIPS and Inception-v3, written with torch's functions over state dicts of the published names.

They stand in for torchvision, lpips and pytorch-fid in the default tests; test_packages.py compares with those.
"""

import numpy as np
import torch
import torch.nn.functional as F

from truepose_jax.evaluate.weights import PUBLISHED, shapes_of
from truepose_jax.pretrained.conversion import key_maps

ALEXNET = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))


def random_state(metric: str, seed: int) -> dict[str, torch.Tensor]:
    """Random weights by the published names: unit gain, norms about the identity, linear layers of LPIPS >= 0."""
    rng = np.random.default_rng(seed)
    state = {}
    for path, leaf in key_maps.leaves(shapes_of(metric)):
        name, shape = key_maps.torch_name(path), key_maps.torch_shape(path, leaf.shape)
        noise = rng.standard_normal(shape)
        if len(shape) > 1:
            noise *= np.sqrt(2 / np.prod(shape[1:]))
            noise = np.abs(noise) if name.startswith("lin") else noise
        elif name.endswith(("running_var", "bn.weight")):
            noise = 1.0 + 0.3 * np.abs(noise)
        else:
            noise *= 0.2
        state[name] = torch.from_numpy(noise.astype(np.float32))
    return state


def lpips(state, a, b):
    """[n] of images NCHW in [-1, 1]."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((i - shift[:, None, None]) / scale[:, None, None] for i in (a, b))
    total = 0
    for k, (layer, stride, padding) in enumerate(ALEXNET):
        w, bias = state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]
        if k in (1, 2):
            x, y = F.max_pool2d(x, 3, 2), F.max_pool2d(y, 3, 2)
        x, y = (torch.relu(F.conv2d(i, w, bias, stride, padding)) for i in (x, y))
        unit = [i / (torch.sqrt((i**2).sum(1, keepdim=True)) + 1e-10) for i in (x, y)]
        total = total + F.conv2d((unit[0] - unit[1]) ** 2, state[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
    return total


class Inception:
    """features(images NCHW) -> [n 2048]."""

    def __init__(self, state, *, tensorflow):
        self.state, self.tensorflow = state, tensorflow

    def conv(self, name, x, stride=1, padding=0):
        s = self.state
        x = F.conv2d(x, s[f"{name}.conv.weight"], None, stride, padding)
        mean, var = s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"]
        return torch.relu(F.batch_norm(x, mean, var, s[f"{name}.bn.weight"], s[f"{name}.bn.bias"], False, 0.0, 0.001))

    def chain(self, block, x, *steps):
        for name, padding in steps:
            x = self.conv(f"{block}.{name}", x, 1, padding)
        return x

    def mean(self, x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=not self.tensorflow)

    def a(self, n, x):
        return [
            self.chain(n, x, ("branch1x1", 0)),
            self.chain(n, x, ("branch5x5_1", 0), ("branch5x5_2", 2)),
            self.chain(n, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)),
            self.chain(n, self.mean(x), ("branch_pool", 0)),
        ]

    def b(self, n, x):
        double = self.chain(n, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        return [
            self.conv(f"{n}.branch3x3", x, 2),
            self.conv(f"{n}.branch3x3dbl_3", double, 2),
            F.max_pool2d(x, 3, 2),
        ]

    def c(self, n, x):
        wide, tall = (0, 3), (3, 0)
        double = zip((f"branch7x7dbl_{i}" for i in range(1, 6)), (0, tall, wide, tall, wide), strict=True)
        return [
            self.chain(n, x, ("branch1x1", 0)),
            self.chain(n, x, ("branch7x7_1", 0), ("branch7x7_2", wide), ("branch7x7_3", tall)),
            self.chain(n, x, *double),
            self.chain(n, self.mean(x), ("branch_pool", 0)),
        ]

    def d(self, n, x):
        three = self.chain(n, x, ("branch3x3_1", 0))
        seven = self.chain(n, x, ("branch7x7x3_1", 0), ("branch7x7x3_2", (0, 3)), ("branch7x7x3_3", (3, 0)))
        return [
            self.conv(f"{n}.branch3x3_2", three, 2),
            self.conv(f"{n}.branch7x7x3_4", seven, 2),
            F.max_pool2d(x, 3, 2),
        ]

    def e(self, n, x):
        three = self.chain(n, x, ("branch3x3_1", 0))
        double = self.chain(n, x, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.tensorflow and n == "Mixed_7c" else self.mean(x)
        return [
            self.chain(n, x, ("branch1x1", 0)),
            self.chain(n, three, ("branch3x3_2a", (0, 1))),
            self.chain(n, three, ("branch3x3_2b", (1, 0))),
            self.chain(n, double, ("branch3x3dbl_3a", (0, 1))),
            self.chain(n, double, ("branch3x3dbl_3b", (1, 0))),
            self.chain(n, pooled, ("branch_pool", 0)),
        ]

    def features(self, x):
        x = self.conv("Conv2d_2a_3x3", self.conv("Conv2d_1a_3x3", x, 2))
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, 1, 1), 3, 2)
        x = F.max_pool2d(self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x)), 3, 2)
        blocks = {"5b": self.a, "5c": self.a, "5d": self.a, "6a": self.b, "6b": self.c, "6c": self.c, "6d": self.c}
        blocks |= {"6e": self.c, "7a": self.d, "7b": self.e, "7c": self.e}
        for name, block in blocks.items():
            x = torch.cat(block(f"Mixed_{name}", x), 1)
        return x.mean((2, 3))


def save_weights(folder, metric: str, seed: int):
    """A converted weight file made by the program from .pth files of random tensors; (path, state dict)."""
    from truepose_jax.evaluate.weights import convert

    state = random_state(metric, seed)
    extra = (
        {} if metric == "lpips" else {"fc.weight": torch.zeros(2, 2048), "x.bn.num_batches_tracked": torch.tensor(0)}
    )
    parts = {"all": state | extra}
    if metric == "lpips":
        parts = {
            "alexnet": {k: v for k, v in state.items() if k.startswith("features")}
            | {"classifier.1.bias": torch.ones(2)},
            "lin": {k: v for k, v in state.items() if k.startswith("lin")},
        }
    paths = []
    for name, tensors in parts.items():
        paths.append(str(folder / f"{metric}-{name}.pth"))
        torch.save(tensors, paths[-1])
    out = folder / f"{metric}.safetensors"
    convert(paths, str(out))
    assert metric in PUBLISHED
    return out, state
