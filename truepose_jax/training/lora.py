"""Low-rank adapters (Hu et al. 2021): of a matrix W [in out] that stays as it is, W + alpha / rank A B trains by A and B.

They lie beside the networks they adapt, lora/<the matrix's path>/{lora_A [in rank], lora_B [rank out]}/kernel, and begin as
PEFT's do: A uniform, B zero. A network is always run with its matrices added up (`merged`): one rule for every layer of every
method, with the low-rank path's gradients. The price: a step holds the sums and their gradients, though no moments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from truepose_jax.config import ConfigError, LoraConfig
from truepose_jax.methods.base import Params
from truepose_jax.runtime import rng
from truepose_jax.runtime.sharding import path_of

LORA = "lora"
"""Beside the networks in a parameter tree."""

ADAPTERS = f"^{LORA}/"
"""Regex of the paths that train."""


def targets_of(params: Params, config: LoraConfig) -> dict[str, Any]:
    """{path: matrix} of what the regex finds. Raises ConfigError where that is nothing, or no matrix."""
    pattern = re.compile(config.targets)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {path_of(path): leaf for path, leaf in leaves if pattern.search(path_of(path))}
    if not found:
        raise ConfigError(f"config.optim.lora.targets {config.targets!r} finds none of the parameters")
    for path, leaf in found.items():
        if leaf.ndim != 2 or not path.endswith("/kernel"):
            raise ConfigError(
                f"config.optim.lora.targets finds {path} of shape {leaf.shape}; only matrices are adapted"
            )
    return found


def adapters(key: jax.Array, params: Params, config: LoraConfig) -> Params:
    """Of all targets in `params`, as they are at birth."""
    made: dict[str, Any] = {}
    for path, matrix in targets_of(params, config).items():
        (width, out), bound = matrix.shape, 1 / math.sqrt(matrix.shape[0])
        *modules, _ = path.split("/")
        node = made
        for module in modules:
            node = node.setdefault(module, {})
        a = jax.random.uniform(rng.key(key, path), (width, config.rank), minval=-bound, maxval=bound)
        node |= {"lora_A": {"kernel": a}, "lora_B": {"kernel": jnp.zeros((config.rank, out))}}
    return made


def merged(params: Params, config: LoraConfig) -> Params:
    """The networks' own tree, adapters added to their matrices; `params` where it has none."""
    if LORA not in params:
        return params
    networks = {name: tree for name, tree in params.items() if name != LORA}
    return _added(networks, params[LORA], config.alpha / config.rank)


def _added(tree: Mapping[str, Any], pairs: Mapping[str, Any], scale: float) -> dict[str, Any]:
    if "lora_A" in pairs:
        a, b = (pairs[name]["kernel"] for name in ("lora_A", "lora_B"))
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return {**tree, "kernel": tree["kernel"] + scale * product}
    return {name: _added(x, pairs[name], scale) if name in pairs else x for name, x in tree.items()}
