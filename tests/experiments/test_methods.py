"""What the other papers' methods are judged by, on answers that are known."""

import numpy as np
import pytest

from experiments import methods
from experiments.methods_judge import agreement, nearest, thresholds


def test_nearest():
    """Rows of a gallery that lie nearest to their own target."""
    target = np.eye(4)
    fused = np.float64([[1, 0, 0, 0], [0, 0.1, 1, 0], [0, 0, 1, 0], [0.9, 0, 0, 1]])
    assert nearest(fused, target, np.array([[0, 1, 2, 3]])) == 0.75
    assert (
        nearest(fused, target, np.array([[0, 1], [2, 3]])) == 1
    )  # the stranger that is nearest to the second row is not there


class Painted:
    """A crowd whose trunks are of one colour a canvas, a tile or a key."""

    def __init__(self, colour):
        self.colour = colour

    def made(self, sources, poses, *, seed):
        return np.array([[self.colour(seed, tile) for tile in range(3)]])

    def colours(self, images, views):
        return np.repeat(images[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    "colour, within, across",
    [
        (lambda seed, tile: 30.0 * seed, 0, 40),  # keys 0, 30 and 60: 30, 30 and 60 apart
        (lambda seed, tile: 30.0 * tile, 40, 40),
        (lambda seed, tile: 0.0, 0, 0),
    ],
)
def test_agreement(colour, within, across):
    found = agreement(Painted(colour))
    assert (found["within"], found["across"]) == pytest.approx((within, across))


def canvases(gain, within):
    scenarios = {
        which: {side: {"clothes": 12.5, "person": 12.0} for side in ("back", "front")} for which in ("T1", "T3")
    }
    gains, agreed = {"other side": gain, "same side": 0.1}, {"within": within, "across": 20.0}
    return {
        "steps": 9, "date": "2026-01-01", "machine": {"cpu": "a CPU"}, "eval": {},
        "canvases": {"scenarios": scenarios, "second_source_gain": gains, "agreement": agreed},
    }  # fmt: skip


def test_a_page():
    """Thresholds of what is to be proved, and one table of the ablations."""
    report = {"imagpose": canvases(3.5, 11.0), "full": canvases(3.1, 1.0), "B4": canvases(0.2, 1.0)}
    report = {name: row | {"thresholds": thresholds(name, row)} for name, row in report.items()}
    assert list(report["imagpose"]["thresholds"].values()) == [True, True, True, False]
    page = methods.page(report)
    assert "- met: a second source, of the unseen side: +3.50 dB" in page
    assert "- MISSED: within a canvas by 11.0, 0.55" in page
    assert "| B4 | no, yes, yes | 12.50 | 12.50 | 12.50 | +0.20; +0.10 |" in page and "## B4" not in page
