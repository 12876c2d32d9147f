"""A Stable Diffusion 1.5 folder of real format and size, in bf16 with random values: converted, trained, exported, opened.

25 minutes on two cores, 20 GiB of memory, 25 GiB of disk: `pytest -m slow tests/pretrained/conversion/test_full_size.py -s`.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

ROOT = pathlib.Path(__file__).resolve().parents[3]
GIB = 2**30


def run(module: str, *arguments: str) -> tuple[str, float]:
    """(what it printed, its peak memory in GiB)."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output[-3000:]
    peak = usage.ru_maxrss * 1024 / GIB
    print(f"\n{output.strip()[-2500:]}\n{module}: peak {peak:.2f} GiB", flush=True)
    return output, peak


def size_of(folder: pathlib.Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / GIB


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Values of a network that computes something finite, in bf16."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0.0, (1 / p[0].numel()) ** 0.5, generator=generator)
            else:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator) + float(name.endswith("weight")))
    return module.to(torch.bfloat16)


def write_sd15(folder: pathlib.Path) -> None:
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    randomise(unet).save_pretrained(folder / "unet")
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    randomise(vae).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")


def write_clip(folder: pathlib.Path) -> None:
    """ViT-L/14 with its projection to 768."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    randomise(CLIPVisionModelWithProjection(config)).save_pretrained(folder)


@pytest.mark.slow
def test_sd15_in_and_out(tmp_path):
    sd15, clip, start, export = (tmp_path / name for name in ("sd15", "clip", "start", "export"))
    write_sd15(sd15)
    write_clip(clip)
    _, peak = run(
        "truepose_jax.convert", "from-torch", "--model=sd15", f"--src={sd15}", f"--clip={clip}", f"--dst={start}"
    )
    print(f"from-torch: {size_of(start):.2f} GiB written")
    assert peak < 1.3 * size_of(start)

    workdir = tmp_path / "run"
    _, peak = run(
        "truepose_jax.train",
        "--config=configs/truepose_deepfashion_512.py",
        f"--workdir={workdir}",
        f"--config.init_from={start}",
        "--config.optim.trainable=/hpfa/",
        "--config.optim.ema_decay=0.0",
        "--config.total_steps=2",
        "--config.batch_size=1",
        "--config.data.dataset=synthetic",
        "--config.data.flip=False",
        "--config.data.synthetic.identities=2",
        "--config.data.synthetic.poses_per_identity=2",
        "--config.data.synthetic.heldout_identities=1",
        "--config.eval.pairs=1",
        "--config.eval.batch_size=1",
        "--config.eval.steps=1",
        "--config.eval.guidance=1.0",
        "--config.eval.sheet_rows=1",
        "--config.model.dtype=float32",
    )
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2] and all(np.isfinite(s["loss"]) for s in steps)
    assert all(s["skipped"] == 0 for s in steps)

    run("truepose_jax.convert", "to-torch", f"--workdir={workdir}", f"--dst={export}", "--dtype=bfloat16")
    with torch.no_grad():
        given = UNet2DConditionModel.from_pretrained(sd15 / "unet", torch_dtype=torch.bfloat16).state_dict()
        for net in ("source_net", "target_net"):
            found, info = UNet2DConditionModel.from_pretrained(
                export / net, torch_dtype=torch.bfloat16, output_loading_info=True
            )
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            found = found.state_dict()
            assert found.keys() == given.keys()
            different = [name for name in given if not torch.equal(given[name], found[name])]
            assert not different, different[:5]
    DDIMScheduler.from_pretrained(export / "scheduler")
