"""POST /v1/repose and GET /health, and what holds for every request: its length is known and bounded, nothing leaves the page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from input_pipeline.annotations.keypoints import float32_of
from input_pipeline.annotations.photo import MAX_SIDE, decode_photo, one_line
from input_pipeline.schema import NUM_JOINTS, InputError, UserError
from truepose_jax.inference.photo_requests import PhotoOptions
from truepose_jax.runtime.cli import parse_size
from truepose_jax.serve.engine import Ask, Busy, Engine, png

MOST_BYTES = 40 << 20
"""Of a request: two photos and a form."""
MOST_TEXT = 20_000
FILES, FIELDS = 2, 16
CROPS = {"": None, "person": True, "none": False}
FLAGS = {"": False, "false": False, "true": True}
OF_FIELD: Mapping[str, Callable[[str], Any]] = {
    "seed": int, "steps": int, "guidance": float, "sampler": str, "model": str, "parsing": str,
    "person": int, "pose_person": int, "crop": CROPS.__getitem__, "align_pose": FLAGS.__getitem__,
}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Of every answer: whatever a page of it holds, it speaks with this server alone."""


class Guard:
    """ASGI: refuses bodies of unknown length (411) and long ones (413), and adds HEADERS to what the application answers."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent = dict(scope["headers"])
        length = sent.get(b"content-length", b"0").decode("latin-1")
        status = None
        if b"transfer-encoding" in sent:
            status, why = 411, "give a Content-Length"
        elif not length.isdecimal() or int(length) > MOST_BYTES:
            status, why = 413, f"a request holds at most {MOST_BYTES >> 20} MiB"
        if status is not None:
            from starlette.responses import JSONResponse

            return await JSONResponse({"error": why}, status)(scope, receive, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *extra]}
            await send(message)

        await self._app(scope, receive, with_headers)


def add_routes(app, engine: Engine) -> None:
    """On a FastAPI application."""
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    async def health(request: Request):
        del request
        return JSONResponse({"status": "ok", "models": list(engine.runs)})

    async def repose(request: Request):
        try:
            form = await request.form(max_files=FILES, max_fields=FIELDS, max_part_size=MOST_TEXT)
            files = {k: await v.read() for k, v in form.multi_items() if isinstance(v, UploadFile)}
            fields = {k: v for k, v in form.multi_items() if isinstance(v, str)}
            (picture,) = await run_in_threadpool(lambda: engine.make(ask_of(files, fields)))
        except Busy as error:
            return JSONResponse({"error": str(error)}, 429, {"Retry-After": "5"})
        except (UserError, HTTPException) as error:
            return JSONResponse({"error": getattr(error, "detail", None) or one_line(error)}, 400)
        return Response(png(picture), media_type="image/png")

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/v1/repose", repose, methods=["POST"])


def ask_of(files: Mapping[str, bytes], fields: Mapping[str, str]) -> Ask:
    """A form of /v1/repose. Raises InputError."""
    unknown = [name for name in (*files, *fields) if name not in {"source", "pose", "joints", "pose_frame", *OF_FIELD}]
    if unknown:
        raise InputError(f"a form has no {unknown[0][:60]!r}; see python -m truepose_jax.serve --help")
    posed = ({"pose"} & files.keys()) | ({"joints", "pose_frame"} & fields.keys())
    if "source" not in files or posed not in ({"pose"}, {"joints", "pose_frame"}):
        raise InputError("give the file source, and either the file pose or the fields joints and pose_frame")
    values = {}
    for name, read in OF_FIELD.items():
        try:
            values[name] = read(fields[name]) if name in fields else None
        except (ValueError, KeyError) as error:
            raise InputError(f"{name} is {fields[name][:60]!r}, which is no value of it") from error
    whom = (1 if values[name] is None else values[name] for name in ("person", "pose_person"))
    options = PhotoOptions(*whom, values["crop"], bool(values["align_pose"]))
    wanted = {name: values[name] for name in ("seed", "steps", "guidance", "sampler", "model", "parsing")}
    wanted = {name: value for name, value in wanted.items() if value is not None}

    def source() -> np.ndarray:
        return decode_photo(files["source"], name="source")

    if "joints" in fields:
        try:
            frame = parse_size(fields.get("pose_frame", ""))
            joints = joints_of(json.loads(fields["joints"]), frame)
        except (json.JSONDecodeError, RecursionError, argparse.ArgumentTypeError) as error:
            raise InputError(f"joints and pose_frame: not 18 x, y, visible and HxW ({one_line(error)})") from error
        return Ask(source, lambda: joints, frame_hw=frame, options=options, **wanted)
    return Ask(source, lambda: decode_photo(files["pose"], name="pose"), options=options, **wanted)


def joints_of(rows: Any, frame_hw: tuple[int, int]) -> np.ndarray:
    """float32 [18 3] of a request's lists, in a frame of bounded size. Raises InputError."""
    if not all(isinstance(x, int) and 1 <= x <= MAX_SIDE for x in frame_hw):
        raise InputError(f"a pose's frame is at most {MAX_SIDE} pixels a side")
    try:
        joints = float32_of(rows)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"joints are not numbers ({one_line(error)})") from error
    if joints.shape != (NUM_JOINTS, 3) or not np.isfinite(joints).all() or np.abs(joints).max() > 2 * MAX_SIDE:
        raise InputError(f"joints are {list(joints.shape)}; give 18 of finite x, y, visible, near their frame")
    return joints
