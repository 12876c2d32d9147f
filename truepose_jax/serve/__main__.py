"""Starts the server. What it is told: truepose_jax/serve/flags.py."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Sequence

from input_pipeline.schema import InputError
from truepose_jax.detection.blazepose import blazepose
from truepose_jax.runtime.cli import enable_compilation_cache, install, program
from truepose_jax.serve.api import MOST_BYTES, Guard, add_routes
from truepose_jax.serve.engine import Engine
from truepose_jax.serve.flags import make_parser


@program
def main(argv: Sequence[str]) -> None:
    """Returns the exit code: 2, and one line on stderr, for bad input."""
    flags = make_parser().parse_args(argv)
    with _listening(flags) as listener, tempfile.TemporaryDirectory(prefix="truepose_serve_") as folder:
        # Gradio reads these when it is imported: it reports nothing, and keeps uploads with this server.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "DISABLE_TELEMETRY": "1"}
        engine = open_engine(flags.workdir or [], flags.waiting)
        app = make_app(engine, pathlib.Path(folder))
        import uvicorn

        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving at http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listener])


def open_engine(workdirs: Sequence[str], waiting: int) -> Engine:
    """What makes the pictures. Raises InputError, CheckpointError and ConfigError; what is missing before any long work."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"serving needs Gradio: {install('web,pose')}")
    blazepose()
    enable_compilation_cache()
    return Engine.open(workdirs, waiting)


def make_app(engine: Engine, folder: pathlib.Path):
    """The ASGI application. folder: of this server; uploads, examples and pictures lie there while it runs."""
    import fastapi
    import gradio

    from truepose_jax.serve.page import make_page

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(app, engine)
    page = make_page(engine, folder)
    page.queue(max_size=engine.waiting + 1, default_concurrency_limit=2)
    shown = {"show_error": True, "footer_links": [], "ssr_mode": False, "allowed_paths": [str(folder)]}
    return Guard(gradio.mount_gradio_app(app, page, path="/", max_file_size=MOST_BYTES, **shown))


def _listening(flags: argparse.Namespace) -> socket.socket:
    """Raises InputError."""
    try:
        if not ipaddress.ip_address(flags.host).is_loopback:
            logging.warning("--host=%s: everybody who reaches this address can use the server", flags.host)
        kind = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((flags.host, flags.port))
        listener.listen()
        return listener
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(f"--host={flags.host} --port={flags.port}: cannot listen there ({error})") from error


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    sys.exit(main())
