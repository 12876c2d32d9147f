"""One side of the full-size comparison, in a process of its own: `python -m tests.parity.full_size torch|jax FOLDER`.

`torch` makes SD1.5's UNet with random weights, saves it as diffusers does and runs it; `jax` loads that folder and runs ours
on the same input. Each prints one JSON object: its output's file, seconds of the forward pass, peak memory.
"""

import json
import pathlib
import resource
import sys
import time

import numpy as np

LATENT = (64, 44)
BATCH = 2


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents [b h w 4], timesteps [b], context [b 77 768])."""
    rng = np.random.default_rng(5)
    latents = rng.standard_normal((BATCH, *LATENT, 4), dtype=np.float32)
    return latents, np.array([953, 1]), rng.standard_normal((BATCH, 77, 768), dtype=np.float32)


def with_torch(folder: pathlib.Path) -> tuple[np.ndarray, float]:
    import torch
    from diffusers import UNet2DConditionModel

    from tests.parity.compare import from_nchw, randomise, to_torch

    unet = randomise(UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8), seed=0)
    unet.save_pretrained(folder)
    latents, t, context = inputs()
    with torch.no_grad():
        start = time.perf_counter()
        out = unet(to_torch(latents), torch.from_numpy(t), to_torch(context)).sample
    return from_nchw(out), time.perf_counter() - start


def with_jax(folder: pathlib.Path) -> tuple[np.ndarray, float]:
    import functools

    import jax

    from truepose_jax.models.attention import plain_block
    from truepose_jax.models.unet import UNet2DCondition, UNetConfig
    from truepose_jax.pretrained.conversion import from_torch, key_maps

    net = UNet2DCondition(UNetConfig(), functools.partial(plain_block))
    latents, t, context = inputs()
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), latents, t, context)["params"])
    params = from_torch.load(folder, shapes, key_maps.UNET)
    call = jax.jit(lambda p, *x: net.apply({"params": p}, *x)[0]).lower(params, latents, t, context).compile()
    start = time.perf_counter()
    out = np.asarray(call(params, latents, t, context))
    return out, time.perf_counter() - start


if __name__ == "__main__":
    side, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    out, seconds = {"torch": with_torch, "jax": with_jax}[side](folder)
    file = folder / f"{side}.npy"
    np.save(file, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"file": str(file), "seconds": round(seconds, 2), "peak_gib": round(peak, 2)}))
