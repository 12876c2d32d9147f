"""Our configuration in diffusers' words: config.json of a UNet, scheduler_config.json, and truepose.json for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truepose_jax.config import Config, DenoiserModel, DiffusionConfig, to_dict

# Fields of a diffusers UNet that are the same in every network of ours (SD1.5's).
_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "upcast_attention": False,
}

# squaredcos_cap_v2 is Nichol and Dhariwal's Eq. 17 with the cap of 0.999, as "cosine" is.
_BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


EXCHANGED = ("features", "texture", "alignment", "source_attention", "score")
"""Settings of config.model.fusion in which an ablation or another reading differs from the method itself."""


def unet_config(model: DenoiserModel) -> dict[str, Any]:
    """config.json of a UNet2DConditionModel. attention_head_dim is the number of heads there too."""
    unet, factor = to_dict(model.unet), model.latent_factor
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": [side // factor for side in model.size],
        **unet,
        "attention_head_dim": list(model.unet.heads),
        **_FIXED,
    }


def scheduler_config(diffusion: DiffusionConfig) -> dict[str, Any]:
    """scheduler_config.json of a DDIMScheduler. Its abar_t are ours to float32's rounding (about 1e-6).

    Where x0 is clipped ours lets eps follow: DDIMScheduler.step's use_clipped_model_output=True.
    """
    schedule = diffusion.schedule
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_schedule": _BETAS[schedule.betas],
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "trained_betas": None,
        "prediction_type": _PREDICTIONS[schedule.prediction],
        "clip_sample": schedule.clip_x0 > 0,
        "clip_sample_range": schedule.clip_x0 or 1.0,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": diffusion.spacing,
        "thresholding": False,
        "rescale_betas_zero_snr": schedule.zero_snr,
    }


def labels_of(config: Config, run: Mapping[str, Any]) -> str | None:
    """The label set that it was trained on: the config's, else that of the records. None: they were not at hand."""
    return config.data.labels or run.get("records", {}).get("labels")


def settings(config: Config, *, classes: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """truepose.json: what a program needs beside the two UNets and the schedule to run the model.

    classes: inputs of the parsing encoder; 0 where there is none. run: as of export.write_export.
    """
    model, fusion = config.model, config.model.fusion
    return {
        "method": model.method,
        "image_size": list(model.size),
        "autoencoder": {
            "kind": model.autoencoder,
            "factor": model.latent_factor,
            "channels": model.latent_channels,
        },
        "prediction": config.diffusion.schedule.prediction,
        "sampling": {
            "steps": config.diffusion.steps,
            "spacing": config.diffusion.spacing,
            "guidance": config.diffusion.guidance,
        },
        "fusion": {
            "regions": fusion.regions,
            "delta": fusion.delta,
            "sigma": fusion.sigma,
            "reading": fusion.reading,
            "mask_axis": fusion.mask_axis,
            "carry_latents": fusion.carry_latents,
            "cosine": fusion.cosine,
            "residual": fusion.residual,
            **({} if fusion.is_whole else {name: getattr(fusion, name) for name in EXCHANGED}),
        },
        "carry": to_dict(model.carry),
        "pose_encoder": {"features": model.unet.block_out_channels[0], "stride": model.latent_factor},
        "positions": model.positions,
        "source_parsing": model.source_parsing,
        "classes": classes,
        "labels": labels_of(config, run),
        "run": {"step": run["step"], "weights": run["weights"], "frozen": dict(run.get("frozen") or {})},
    }
