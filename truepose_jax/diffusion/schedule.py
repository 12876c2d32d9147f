"""The noise schedule, and the three things a network may predict. SD1.5's numbers are the defaults (docs/paper.md 6)."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BETA_SCHEDULES = ("scaled_linear", "linear", "cosine")
PREDICTIONS = ("eps", "v", "x0")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps (Eq. 1), t int32 in [0, steps).

    prediction: what the network's output means. zero_snr: the last abar is 0 (Lin et al. 2024; not with "eps"), the first stays:
    sqrt(abar) shifted and scaled. clip_x0: bound on |z_0| while sampling; 0: none (a VAE latent has no
    bound, a pixel latent has 1).
    """

    betas: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    prediction: str = "eps"
    zero_snr: bool = False
    clip_x0: float = 0.0

    def __post_init__(self):
        if self.betas not in BETA_SCHEDULES:
            raise ValueError(f"diffusion.betas is {self.betas!r}; choose one of {BETA_SCHEDULES}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"diffusion.prediction is {self.prediction!r}; choose one of {PREDICTIONS}")
        if self.steps < 1:
            raise ValueError(f"schedule.steps is {self.steps}; it must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"schedule.beta_start and beta_end are {self.beta_start} and {self.beta_end}; expected 0 < start <= end < 1"
            )
        if self.zero_snr and self.prediction == "eps":
            raise ValueError(
                "schedule.zero_snr leaves no signal at the last step, where 'eps' says nothing; predict 'v' or 'x0'"
            )
        if self.clip_x0 < 0:
            raise ValueError(f"schedule.clip_x0 is {self.clip_x0}; it must be 0 (none) or more")

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, float32 [steps]. Betas and their products in float64, rounded once."""
        if self.betas == "cosine":
            # Nichol & Dhariwal 2021, Eq. 17, betas capped at 0.999.
            f = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1.0 - f[1:] / f[:-1], 0.999)
        elif self.betas == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.steps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2
        abar = np.cumprod(1.0 - betas)
        if self.zero_snr:
            signal = np.sqrt(abar)
            abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
        return abar.astype(np.float32)

    def snr(self, t: Int[Array, " b"]) -> Float[Array, " b"]:
        """abar / (1 - abar)."""
        abar = self.alphas_cumprod.astype(np.float64)
        return jnp.asarray((abar / (1.0 - abar)).astype(np.float32))[t]

    def signal_and_noise(self, t: Int[Array, " b"]) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
        """(sqrt(abar_t), sqrt(1 - abar_t)), shaped to multiply latents."""
        abar = jnp.asarray(self.alphas_cumprod)[t][:, None, None, None]
        return jnp.sqrt(abar), jnp.sqrt(1.0 - abar)

    def add_noise(self, x0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Int[Array, " b"]):
        """Eq. 1."""
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def regression_target(self, x0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Int[Array, " b"]):
        """What the network should output: eps, v = signal eps - noise x0, or x0."""
        signal, noise = self.signal_and_noise(t)
        return {"eps": lambda: eps, "v": lambda: signal * eps - noise * x0, "x0": lambda: x0}[self.prediction]()

    def split(self, x_t: Float[Array, "b h w c"], output: Float[Array, "b h w c"], t: Int[Array, " b"]):
        """(x0, eps) that the network's output stands for, x0 clipped where clip_x0 says so (eps then follows x0)."""
        signal, noise = self.signal_and_noise(t)
        if self.prediction == "eps":
            x0, eps = (x_t - noise * output) / signal, output
        elif self.prediction == "v":
            x0, eps = signal * x_t - noise * output, noise * x_t + signal * output
        else:
            x0, eps = output, (x_t - signal * output) / noise
        if self.clip_x0:
            x0 = jnp.clip(x0, -self.clip_x0, self.clip_x0)
            eps = (x_t - signal * x0) / noise
        return x0, eps
