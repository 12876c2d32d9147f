"""What the tests of the server share: its application on a tiny model, and drawn people as photos."""

import contextlib
import functools
import pathlib
import socket
import threading
import time

from input_pipeline.synthetic.people import SyntheticPeople
from tests.programs.test_generate_head import head_run
from truepose_jax.serve.engine import Engine, png

WAITING = 1


@functools.cache
def engine() -> Engine:
    return Engine.open([str(head_run())], WAITING)


@functools.cache
def photo(i: int) -> bytes:
    """A PNG of drawn person i: 3 and 5 are seen from the front."""
    people = SyntheticPeople(seed=5, split="train", identities=6, poses_per_identity=1, size=(384, 288))
    return png(people.image(i).image)


@contextlib.contextmanager
def running(folder: pathlib.Path):
    """The address of a real server of that application, in a thread."""
    import uvicorn

    from truepose_jax.serve.__main__ import make_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(engine(), folder), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
