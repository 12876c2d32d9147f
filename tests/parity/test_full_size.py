"""SD1.5's UNet at its real size against diffusers', each in a process of its own (7 GiB and 2 minutes)."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.parity.compare import NETWORK, difference

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(side: str, folder: pathlib.Path) -> dict:
    command = [sys.executable, "-m", "tests.parity.full_size", side, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_unet_forward_at_512x352(tmp_path):
    theirs, ours = run("torch", tmp_path), run("jax", tmp_path)
    found = difference(np.load(ours["file"]), np.load(theirs["file"]))
    print(f"\nfull-size UNet, 64x44 latents: {found:.1e}; torch {theirs}, ours {ours}")
    assert found < NETWORK
