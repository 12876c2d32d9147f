"""A skeleton whose joints are dragged: what gr.HTML shows and does. Its value: {"image": data URI, "h", "w", "joints": [18][x, y,
visible]} in pixels of the frame h x w, or None."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline.annotations.keypoints import JOINT_NAMES
from input_pipeline.skeletons import OPENPOSE

SHOWN = 768
"""Longest side of the picture under the skeleton."""


def editor_value(photo: np.ndarray, joints: np.ndarray) -> dict[str, Any]:
    """photo: uint8 [h w 3]. joints: float32 [18 3] in its pixels; their exact values travel to the page and back."""
    h, w = photo.shape[:2]
    small = Image.fromarray(photo)
    small.thumbnail((SHOWN, SHOWN))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    image = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"image": image, "h": h, "w": w, "joints": joints.tolist()}


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb{tuple(colour)}"


_LINES = json.dumps([[a, b, _rgb(colour)] for (a, b), colour in zip(OPENPOSE.bones, OPENPOSE.shades, strict=False)])
_DOTS = json.dumps([[name, _rgb(colour)] for name, colour in zip(JOINT_NAMES, OPENPOSE.colours, strict=True)])

TEMPLATE = """
${value && value.joints ? `<svg data-pose viewBox="0 0 ${value.w} ${value.h}"
  style="width:100%;max-height:520px;touch-action:none;background:#111;border-radius:8px">
<image href="${value.image}" width="${value.w}" height="${value.h}" opacity="0.6"/>
${LINES.map(([a, b, c]) => value.joints[a][2] > 0 && value.joints[b][2] > 0 ? `<line data-bone="${a},${b}"
  x1="${value.joints[a][0]}" y1="${value.joints[a][1]}" x2="${value.joints[b][0]}" y2="${value.joints[b][1]}"
  stroke="${c}" stroke-width="${value.h / 100}"/>` : '').join('')}
${value.joints.map((j, i) => j[2] > 0 ? `<circle data-joint="${i}" cx="${j[0]}" cy="${j[1]}" r="${value.h / 60}"
  fill="${DOTS[i][1]}" stroke="white" stroke-width="${value.h / 400}" style="cursor:grab"><title>${DOTS[i][0]}</title></circle>`
  : '').join('')}</svg>` : `<p style="opacity:.7">Its skeleton comes here. Drag joints; double-click one to take it away.</p>`}
""".replace("LINES", _LINES).replace("DOTS", _DOTS)

ON_LOAD = """
let held = null;
const place = event => {
  const svg = element.querySelector('[data-pose]'), point = svg.createSVGPoint();
  point.x = event.clientX; point.y = event.clientY;
  return point.matrixTransform(svg.getScreenCTM().inverse());
};
const put = (joint, row) => {
  const value = JSON.parse(JSON.stringify(props.value));
  value.joints[joint] = row;
  props.value = value;
  trigger('change');
};
element.addEventListener('pointerdown', event => {
  held = event.target.closest('[data-joint]');
  if (held) event.preventDefault();
});
element.addEventListener('pointermove', event => {
  if (!held) return;
  const {x, y} = place(event), joint = held.dataset.joint;
  held.setAttribute('cx', x); held.setAttribute('cy', y);
  held.dataset.moved = 1;
  element.querySelectorAll('[data-bone]').forEach(line => line.dataset.bone.split(',').forEach((end, i) => {
    if (end === joint) { line.setAttribute('x' + (i + 1), x); line.setAttribute('y' + (i + 1), y); }
  }));
});
window.addEventListener('pointerup', () => {
  const dot = held;
  held = null;
  if (dot && dot.dataset.moved) put(+dot.dataset.joint, [+dot.getAttribute('cx'), +dot.getAttribute('cy'), 1]);
});
element.addEventListener('dblclick', event => {
  const dot = event.target.closest('[data-joint]');
  if (dot) put(+dot.dataset.joint, [0, 0, 0]);
});
"""
