"""The painter of synthetic people: parts are strips of textured quads, painted back to front as ids.

Every quad knows its parsing label and how to turn a pixel into cloth coordinates, so that colours, shading
and the parsing map all come from the same buffer. Colours are computed for visible samples only, after hidden
parts are gone. Parts are only noted down at first; the geometry of all of them is worked out in one go,
because a figure has a hundred small parts and NumPy calls on small arrays cost more than the arithmetic.

Units: the figure hands over points in the normalised frame (poses.py); cloth coordinates are in head heights.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np

from input_pipeline.synthetic.shading import Pattern, resolved

FRACTION_BITS = 4
"""Fixed-point bits of polygon corners: 1/16 of a sample."""

LIGHT = np.array([-0.55, -0.83], np.float32)
"""Direction towards the light in the image: from the upper left, as in most studio photos."""

EDGE = 0.34
"""Usual darkening of the rims of a strip."""

SHORTEST_LIMB = 0.12
"""A limb seen along its axis is drawn this long, in head heights, to stay a strip."""

_ARC = np.array([-0.85, -0.5, 0.0, 0.5, 0.85])
_ARC_RISE = np.sqrt(1 - _ARC * _ARC)


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Colour of a surface: rgb + pattern * change, in [0, 255]. folds: depth of creases, 0 to 1."""

    rgb: tuple[float, float, float]
    pattern: Pattern | None = None
    change: tuple[float, float, float] = (0.0, 0.0, 0.0)
    folds: float = 0.0

    def shaded(self, factor: float) -> Material:
        """The same surface, plain, brighter or darker by a factor."""
        return Material(tuple(min(255.0, c * factor) for c in self.rgb), folds=self.folds)


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    rows: int  # edges of the strip, one more than its quads
    material: Material
    label: int
    layer: int
    radius: float
    turn: float
    shade: float
    caps: tuple[float, float]
    outline: np.ndarray | None  # [m 2], instead of the quads' own corners


@functools.lru_cache(maxsize=128)
def ellipse(rx: float, ry: float, n: int = 16) -> np.ndarray:
    """Points [n 2] of an ellipse about the origin, clockwise in the image from the positive x axis."""
    angles = np.linspace(0, 2 * np.pi, n, endpoint=False)
    points = np.stack([rx * np.cos(angles), ry * np.sin(angles)], -1)
    points.setflags(write=False)
    return points


class Canvas:
    """Collects parts back to front, then paints them. `unit` is the head height in the normalised frame."""

    def __init__(self, unit: float):
        self.unit = unit
        self.layer = 0
        self._parts: list[_Part] = []
        self._strips: list[tuple] = []  # (minus, plus, v, edge)
        self._limbs: list[tuple] = []  # (start, end, fractions, half-widths, v0, v1, edge0, edge1, cap0, cap1)
        self._strip_parts: list[int] = []
        self._limb_parts: list[int] = []

    def ribbon(
        self, minus, plus, v, *, material, label, radius, turn=0.0, edge=EDGE, shade=1.0, cap=(0.0, 0.0)
    ):  # fmt: skip
        """A strip between two rows of points minus, plus [k 2], textured and shaded like a cylinder.

        v [k]: cloth coordinate along the strip. radius: of the cylinder, which maps angles to cloth. turn:
        angle of the cloth at the middle of the strip. edge: darkening at the rims, one number or [k]. cap:
        lengths of round ends, frame units.
        """
        self._strip_parts.append(len(self._parts))
        self._strips.append((minus, plus, v, [edge] * len(minus) if isinstance(edge, float) else edge))
        self._parts.append(_Part(len(minus), material, label, self.layer, radius, turn, shade, cap, None))

    def limb(
        self, start, end, profile, *, v, material, label, radius, caps=(0.0, 0.0), turn=0.0,
        edge=(EDGE, EDGE), shade=1.0
    ):  # fmt: skip
        """A strip along the bone start -> end.

        profile: (fractions [k] of the bone, half-widths [k] in head heights). v: cloth y at both ends. caps:
        round ends, in half-widths. edge: darkening of the rims at the start and from 0.4 of the bone on.
        """
        self._limb_parts.append(len(self._parts))
        self._limbs.append((start, end, *profile, *v, *edge, *caps))
        self._parts.append(_Part(len(profile[0]), material, label, self.layer, radius, turn, shade, caps, None))

    def polygon(self, points, *, material, label, frame, radius=1.0, turn=0.0, edge=0.0, shade=1.0):
        """A filled outline [m 2]. frame = (origin, right, down): u runs from -1 to 1 over origin -/+ right, v
        from 0 (at origin) to |down| in head heights."""
        origin, right, down = frame
        rows = np.array([origin, origin + down])
        v = (0.0, float(np.hypot(down[0], down[1])) / self.unit)
        self._strip_parts.append(len(self._parts))
        self._strips.append((rows - right, rows + right, v, (edge, edge)))
        self._parts.append(_Part(2, material, label, self.layer, radius, turn, shade, (0.0, 0.0), points))

    def flat(self, points, *, material, label, shade=1.0):
        """A filled outline [m 2] of one plain colour."""
        self._strip_parts.append(len(self._parts))
        # Cloth coordinates do not matter for one plain colour: the outline's own points stand in for a strip.
        self._strips.append((points[:2], points[1:3], (0.0, 1.0), (0.0, 0.0)))
        self._parts.append(_Part(2, material, label, self.layer, 1.0, 0.0, shade, (0.0, 0.0), points))

    def _rows(self):
        """(minus [r 2], plus [r 2], v [r], edge [r], caps [p 2], first row of each part [p + 1]) in order."""
        counts = np.array([part.rows for part in self._parts])
        starts = np.concatenate([[0], np.cumsum(counts)])
        total = starts[-1]
        minus, plus, v, edge = np.empty((total, 2)), np.empty((total, 2)), np.empty(total), np.empty(total)
        caps = np.array([part.caps for part in self._parts])
        if self._strips:
            rows = _row_numbers(starts, counts, np.array(self._strip_parts))
            for target, values in zip((minus, plus, v, edge), zip(*self._strips, strict=True), strict=True):
                target[rows] = np.concatenate(values)
        if self._limbs:
            parts = np.array(self._limb_parts)
            rows = _row_numbers(starts, counts, parts)
            minus[rows], plus[rows], v[rows], edge[rows], caps[parts] = self._limb_rows(counts[parts])
        return minus, plus, v, edge, caps, starts

    def _limb_rows(self, counts):
        start, end, fractions, half, v0, v1, edge0, edge1, cap0, cap1 = zip(*self._limbs, strict=True)
        start, along = np.array(start), np.array(end) - np.array(start)
        fractions, half = np.concatenate(fractions), np.concatenate(half) * self.unit
        length, least = np.hypot(along[:, 0], along[:, 1]), SHORTEST_LIMB * self.unit
        along[length < 1e-9] = (0.0, least)
        length = np.maximum(length, 1e-9)
        along *= np.maximum(1, least / length)[:, None]
        length = np.maximum(length, least)
        normal = np.stack([-along[:, 1], along[:, 0]], -1) / length[:, None]
        limb = np.repeat(np.arange(len(counts)), counts)
        middle = start[limb] + fractions[:, None] * along[limb]
        offset = normal[limb] * half[:, None]
        last = np.cumsum(counts) - 1
        caps = np.stack([np.array(cap0) * half[last - counts + 1], np.array(cap1) * half[last]], -1)
        v0, v1, edge0, edge1 = np.array([v0, v1, edge0, edge1])
        ramp = np.clip((fractions - 0.05) / 0.35, 0, 1)
        v, edge = v0[limb] + fractions * (v1 - v0)[limb], edge0[limb] + ramp * (edge1 - edge0)[limb]
        return middle + offset, middle - offset, v, edge, caps

    def paint(self, *, scale: float, offset: np.ndarray, size: tuple[int, int], samples: int, margin: int):
        """Paints everything on (h, w) pixels: pixel = scale * point + offset, centres at whole numbers.

        samples: per pixel and axis. Only the columns where somebody is are worked on, and `margin` pixels around: w1 of
        them. Returns (image uint8 [h w1 4]: red, green, blue, layer, times coverage; coverage uint8 [h w1]; labels
        uint8 [h w], at the middle of each pixel; columns: the slice of the w columns that w1 stands for).
        """
        minus, plus, v, edge, caps, starts = self._rows()
        upper = np.ones(len(v), bool)
        upper[starts[1:] - 1] = False
        first = np.flatnonzero(upper)  # the row above each quad
        quads = np.stack([minus[first], plus[first], plus[first + 1], minus[first + 1]], 1)
        outlines = np.concatenate([part.outline for part in self._parts if part.outline is not None])
        seen = np.concatenate([minus[:, 0], plus[:, 0], outlines[:, 0]]) * scale + offset[0]
        spare = int(caps.max() * scale) + margin + 1
        low = min(max(0, int(seen.min()) - spare), size[1] - 1)
        columns = slice(low, max(min(size[1], int(seen.max()) + spare + 1), low + 1))

        # From here on in samples, the first column in use at 0.
        offset = (offset - np.array([columns.start, 0]) + 0.5) * samples - 0.5
        scale = scale * samples
        quads_of_part = np.diff(starts) - 1
        quads = quads * scale + offset
        ids = np.zeros((size[0] * samples, (columns.stop - columns.start) * samples), np.int16)
        self._fill(ids, quads, quads_of_part, caps * scale, outlines * scale + offset)
        patterns, groups = _pattern_groups([part.material for part in self._parts])
        surface = self._surface(quads, quads_of_part, v, edge, first)
        surface["pattern"] = np.repeat(groups, quads_of_part)
        image, coverage = resolved(ids, samples, surface, patterns, 1.0 / (scale * self.unit))

        label_of = np.zeros(len(quads) + 1, np.uint8)
        label_of[1:] = np.repeat([part.label for part in self._parts], quads_of_part)
        labels = np.zeros(size, np.uint8)
        middle = samples // 2
        labels[:, columns] = label_of[ids[middle::samples, middle::samples]]
        return image, coverage, labels, columns

    def _surface(self, quads, quads_of_part, v, edge, first) -> dict[str, np.ndarray]:
        """What `_coloured` needs to know of each quad: float32 [q], or [k q] for maps and colours."""
        parts, materials = self._parts, [part.material for part in self._parts]
        names = ("radius", "turn", "shade", "layer")
        numbers = [[getattr(part, name) for name in names] + [part.material.folds] for part in parts]
        numbers = np.repeat(np.array(numbers, np.float32).T, quads_of_part, axis=1)
        colours = np.array([m.rgb + m.change for m in materials], np.float32).T
        colours = np.repeat(colours, quads_of_part, axis=1)
        across = quads[:, 1] - quads[:, 0] + quads[:, 2] - quads[:, 3]
        lit = 0.42 * (across @ LIGHT) / np.maximum(np.hypot(across[:, 0], across[:, 1]), 1e-6)
        rows = np.array(
            [v[first], v[first + 1] - v[first], edge[first], edge[first + 1] - edge[first], lit], np.float32
        )
        surface = dict(zip((*names, "folds"), numbers, strict=True))
        surface |= dict(zip(("v", "dv", "edge", "dedge", "lit"), rows, strict=True))
        return surface | {
            "map": _projections(quads).astype(np.float32),
            "rgb": colours[:3],
            "change": colours[3:],
        }

    def _fill(self, ids, quads, quads_of_part, caps, outlines) -> None:
        """Writes the number of each quad, from 1 on, over its area."""
        fixed = 1 << FRACTION_BITS
        last = np.cumsum(quads_of_part) - 1
        shapes = list(np.rint(np.clip(quads, -8000, 8000) * fixed).astype(np.int32))
        capped = np.flatnonzero(caps.any(1))
        if len(capped):
            starts, stops = caps[capped].T
            single = quads_of_part[capped] == 1  # one quad has both round ends
            numbers = np.concatenate([last[capped] - quads_of_part[capped] + 1, last[capped]])
            lengths = np.stack([np.concatenate([starts, np.where(single, starts, 0)]),
                                np.concatenate([np.where(single, stops, 0), stops])], -1)  # fmt: skip
            rounded = np.rint(_rounded(quads[numbers], lengths) * fixed).astype(np.int32)
            for number, shape in zip(numbers.tolist(), rounded, strict=True):
                shapes[number] = shape
        outlined, start = set(), 0
        outlines = np.rint(outlines * fixed).astype(np.int32)
        for number, part in zip(last.tolist(), self._parts, strict=True):
            if part.outline is not None:
                shapes[number] = outlines[start : start + len(part.outline)]
                start += len(part.outline)
                outlined.add(number)
        for number, shape in enumerate(shapes):
            if number in outlined:
                cv2.fillPoly(ids, [shape], number + 1, cv2.LINE_8, FRACTION_BITS)
            else:
                cv2.fillConvexPoly(ids, shape, number + 1, cv2.LINE_8, FRACTION_BITS)


def _row_numbers(starts, counts, parts) -> np.ndarray:
    """Numbers of all rows of the chosen parts, one after the other."""
    n = counts[parts]
    before = np.cumsum(n) - n
    return np.arange(n.sum()) + np.repeat(starts[parts] - before, n)


def _pattern_groups(materials) -> tuple[list[Pattern], np.ndarray]:
    """The distinct patterns, and for each material the number of its pattern from 1 on (0: plain)."""
    numbers: dict[int, int] = {}
    patterns, groups = [], np.zeros(len(materials), np.uint8)
    for i, material in enumerate(materials):
        if material.pattern is not None:
            if id(material.pattern) not in numbers:
                patterns.append(material.pattern)
                numbers[id(material.pattern)] = len(patterns)
            groups[i] = numbers[id(material.pattern)]
    return patterns, groups


def _rounded(quads, lengths) -> np.ndarray:
    """Outlines [c 14 2] of quads whose two edges bulge out by half ellipses of these lengths [c 2]."""
    m0, p0, p1, m1 = quads[:, 0], quads[:, 1], quads[:, 2], quads[:, 3]
    arcs = []
    for first, last, length in ((m0, p0, lengths[:, 0]), (p1, m1, lengths[:, 1])):
        along = last - first
        size = np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)
        out = np.stack([along[:, 1], -along[:, 0]], -1) * (length / size)[:, None]
        middle = (first + last) / 2
        rise = np.where(length[:, None] > 0, _ARC_RISE, 0.0)
        arcs.append(middle[:, None] + _ARC[:, None] * along[:, None] / 2 + rise[..., None] * out[:, None])
    return np.concatenate([m0[:, None], arcs[0], p0[:, None], p1[:, None], arcs[1], m1[:, None]], 1)


def _projections(quads) -> np.ndarray:
    """Projective maps [9 q] from the image to u in [-1, 1], rows 0-2 / 6-8, and t in [0, 1], rows 3-5 / 6-8.

    The square-to-quad map of Heckbert (1989), inverted by its adjugate and scaled so that the divisor is 1 at
    the middle of the quad.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = quads.transpose(1, 2, 0)
    dx1, dx2, sx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, sy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    det = dx1 * dy2 - dx2 * dy1
    det = np.where(np.abs(det) < 1e-6, 1e-6, det)
    g, h = (sx * dy2 - dx2 * sy) / det, (dx1 * sy - sx * dy1) / det
    a, b, c = x1 - x0 + g * x1, x3 - x0 + h * x3, x0
    d, e, f = y1 - y0 + g * y1, y3 - y0 + h * y3, y0
    s = np.array([e - f * h, c * h - b, b * f - c * e])
    t = np.array([f * g - d, a - c * g, c * d - a * f])
    w = np.array([d * h - e * g, b * g - a * h, a * e - b * d])
    middle = quads.mean(1)
    norm = w[0] * middle[:, 0] + w[1] * middle[:, 1] + w[2]
    norm = np.where(np.abs(norm) < 1e-9, 1e-9, norm)
    return np.concatenate([2 * s - w, t, w]) / norm
