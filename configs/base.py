"""Every setting there is, with the TruePose paper's value where it has one. Other configs start from here."""

from ml_collections import ConfigDict

METHOD = {"regions": 2, "features": "source_net", "texture": "hpfa", "alignment": "caa"}
READINGS = {"source_attention": "side", "score": "logits", "reading": "printed", "mask_axis": "key"}

OURS = {"carry_latents": False, "cosine": False, "residual": False}


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "init_from": "",
            "total_steps": 100_000,
            "batch_size": 12,
            "log_every": 1,
            "model": {
                "method": "truepose",
                "size": (512, 352),
                "autoencoder": "sd15",
                "vae": "",
                "pixel_factor": 8,
                "unet": {
                    "in_channels": 4,
                    "out_channels": 4,
                    "block_out_channels": (320, 640, 1280, 1280),
                    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                    "layers_per_block": 2,
                    "attention_head_dim": (8, 8, 8, 8),
                    "cross_attention_dim": 768,
                    "transformer_layers_per_block": 1,
                    "use_linear_projection": False,
                    "norm_num_groups": 32,
                    "norm_eps": 1e-5,
                },
                "fusion": {
                    **METHOD, **READINGS, **OURS, "delta": 0.6, "sigma": 0.3, "init": "random", "out_init": "zeros",
                },
                "positions": "none",
                "source_parsing": "none",
                "clip": {
                    "path": "",
                    "image_size": 32,
                    "patch_size": 8,
                    "hidden_size": 64,
                    "layers": 2,
                    "heads": 2,
                    "seed": 0,
                },
                "remat": True,
                "dtype": "bfloat16",
                "patch_channels": 24,
                "carry": {"head": False, "width": 40},
            },
            "diffusion": {
                "schedule": {
                    "betas": "scaled_linear",
                    "beta_start": 0.00085,
                    "beta_end": 0.012,
                    "steps": 1000,
                    "prediction": "eps",
                    "clip_x0": 0.0,
                },
                "timestep_power": 1.0,
                "drop_rate": 0.3,
                "steps": 35,
                "spacing": "leading",
                "guidance": 3.5,
                "losses": {"latents": 1.0, "flow": 0.0, "pixels": 0.0, "parsing": 0.0},
            },
            "data": {
                "dataset": "synthetic",
                "root": "",
                "labels": "atr18",
                "keypoints": "",
                "pairs": "self",
                "eval_pairs": "",
                "flip": False,
                "self_pair": 0.0,
                "targets_per_source": 1,
                "threads": 8,
                "workers": 0,
                "latents": "off",
                "max_invalid": 0.05,
                "synthetic": {
                    "identities": 4096,
                    "poses_per_identity": 4,
                    "patterns": "all",
                    "background": "all",
                    "framing": "all",
                    "poses": "",
                    "heldout_identities": 64,
                    "heldout_poses_per_identity": 2,
                },
            },
            "optim": {
                "name": "adamw",
                "trainable": ".*",
                "learning_rate": 1e-5,
                "warmup_steps": 0,
                "schedule": "constant",
                "flat": 0.3,
                "final": 0.02,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 1e-2,
                "clip_norm": 1.0,
                "accumulation": 1,
                "ema_decay": 0.0,
                "max_skips": 10,
                "layout": "tree",
                "noise_scale": "off",
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "checkpoint": {"every": 5_000, "keep": 3, "keep_every": 0, "allow_fallback": False},
            "eval": {"every": 5_000, "pairs": 64, "batch_size": 16, "sheet_rows": 8, "steps": 35, "guidance": 3.5},
        }
    )
