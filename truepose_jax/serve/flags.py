"""A page, and POST /v1/repose and GET /health beside it, for pictures from photos. Needs the [web] and [pose] extras.

    python -m truepose_jax.serve [--workdir=DIR ...] [--port=7860]
    curl -F source=@me.jpg -F pose=@other.jpg http://127.0.0.1:7860/v1/repose --output me_moved.png

Without --workdir it serves the small model that comes along, which has seen drawn people only. POST /v1/repose takes a form: the
files source and pose (or the field joints, JSON of 18 x, y, visible, with pose_frame=HxW) and the fields seed, steps, guidance,
sampler, model (a folder's name), parsing (auto or none), crop (person or none), align_pose (true or false), person, pose_person;
the answer is a PNG, the one that `generate` and Pipeline make with the same seed. 400: what was asked cannot be, with one line
that says why; 411 and 413: no length, or too large; 429: more people wait than --waiting.
Only this machine can reach it unless --host says otherwise; nothing is sent anywhere, and what is uploaded goes with the server.
"""

from __future__ import annotations

import argparse

from truepose_jax.runtime.cli import Parser


def make_parser() -> argparse.ArgumentParser:
    parser = Parser.of_program("serve", __doc__)
    add = parser.add_argument_group("what is served").add_argument
    add("--workdir", action="append", help="a run, an export, OWNER/NAME on the hub; several times for several models")
    add("--waiting", type=int, default=8, help="requests that may wait for the one under way (8)")
    add = parser.add_argument_group("where").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    add("--port", type=int, default=7860, help="0: any that is free (7860)")
    return parser
