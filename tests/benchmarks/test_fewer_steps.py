"""The table of fewer steps: its parts make the sampler's own pictures and count its FLOPs."""

import numpy as np
import pytest

from benchmarks.fewer_steps import Parts, page
from tests.tiny_run import SIZE, shared_pipeline
from truepose_jax.inference.pipeline import Request

pytestmark = pytest.mark.usefixtures("started_quickly")


def test_parts_are_the_sampler():
    pipe = shared_pipeline()
    joints = np.array([[3 + i % 5, 2 + 1.5 * i, 1] for i in range(18)], np.float32)
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    fitted = [pipe.run.fit(Request(photo, joints, name=str(i))) for i in range(2)]
    sampling = pipe.run.sampling(2, 2.0, "ddim", (0.0, 0.4))  # t = 501 alone, 1 guided
    parts = Parts(pipe, sampling, *pipe.batch_of(fitted, 2))
    images, flops, seconds = parts.run("ddim", 2)
    for image, picture in zip(images, pipe.sample(fitted, sampling=sampling), strict=True):
        assert np.abs(image * 255 - picture).max() <= 1
    assert seconds > 0
    guided = parts.run("ddim", 4)[1] - flops  # t = 751, 501, 251, 1: one more of each kind
    assert guided == pytest.approx(sum(each[1] for each in parts.steps.values()) / 2, rel=1e-6)


def test_the_table():
    row = {"sampler": "unipc", "steps": 4, "gflop": 2.5, "cpu_seconds": 0.07, "db": 31.25, "db_worst": 28.0}
    machine = {"cpu": "a CPU", "cores": 1}
    found = {"model": "M", "pairs": 8, "guidance": 1.0, "machine": machine, "date": "2026-01-01", "rows": [row]}
    assert "| UniPC | 4 | 2.50 | 0.070 | 31.2 | 28.0 |" in page(found)
