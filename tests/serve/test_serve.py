"""POST /v1/repose, /health and what guards the server; its pictures are those of `generate` and Pipeline, byte for byte."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.photo import decode_photo
from input_pipeline.schema import InputError

pytest.importorskip("gradio", reason="the [web] extra is not installed")
pytest.importorskip("ai_edge_litert", reason="the [pose] extra is not installed")
from starlette.testclient import TestClient

from tests.programs.test_generate_head import head_run
from tests.serve.server import WAITING, engine, photo
from truepose_jax import generate
from truepose_jax.detection.embedded import find_person
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.serve import __main__ as program
from truepose_jax.serve import api
from truepose_jax.serve.engine import Ask
from truepose_jax.serve.page import about

pytestmark = pytest.mark.usefixtures("started_quickly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve") / "own"


@pytest.fixture(scope="module")
def client(folder, started_quickly):
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        with TestClient(program.make_app(engine(), folder)) as found:
            yield found


def two() -> dict:
    return {"source": ("../../me.png", photo(5), "image/png"), "pose": ("other.png", photo(3), "image/png")}


def test_the_same_picture_everywhere(client, tmp_path, monkeypatch):
    """Over HTTP by photos and by joints, on the command line, from Python."""
    answer = client.post("/v1/repose", files=two(), data={"seed": "3"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
    me, other = (decode_photo(photo(i), name="") for i in (5, 3))
    joints = find_person(other).joints
    form = {"seed": "3", "joints": json.dumps(joints.tolist()), "pose_frame": "384x288"}
    assert client.post("/v1/repose", files={"source": two()["source"]}, data=form).content == answer.content

    for name, i in (("me", 5), ("other", 3)):
        (tmp_path / f"{name}.png").write_bytes(photo(i))
    pipe = engine()._pipeline("")
    monkeypatch.setattr(Pipeline, "of_run", lambda run, **_: pipe)
    files = [
        f"--{flag}={tmp_path / name}" for flag, name in (("source", "me.png"), ("pose", "other.png"), ("out", "o.png"))
    ]
    assert generate.main([f"--workdir={head_run()}", *files, "--seed=3"]) == 0
    assert (tmp_path / "o.png").read_bytes() == answer.content
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.array_equal(pipe(me, pose=other, seed=3, callback=lambda done, steps: None), picture)
    assert client.post("/v1/repose", files=two(), data={"seed": "4"}).content != answer.content
    assert client.post("/v1/repose", files=two(), data={"seed": "3", "align_pose": "true"}).content != answer.content


@pytest.mark.parametrize(
    ("files", "form", "words"),
    [
        ({"source": None}, {}, "give the file source"),
        ({"pose": None}, {}, "either the file pose or the fields joints"),
        ({}, {"joints": "[]", "pose_frame": "4x3"}, "either the file pose or the fields joints"),
        ({}, {"pose_frame": "4x3"}, "either the file pose or the fields joints"),
        ({"pose": None}, {"joints": "[[1, 2, 3]]", "pose_frame": "40x30"}, "joints are [1, 3]"),
        ({"pose": None}, {"joints": json.dumps([[1e308, 0, 1]] * 18), "pose_frame": "40x30"}, "18 of finite x, y"),
        ({"pose": None}, {"joints": "[1", "pose_frame": "40x30"}, "not 18 x, y, visible"),
        ({"pose": None}, {"joints": "[]", "pose_frame": "99999x30"}, "at most 8192 pixels a side"),
        ({"source": b"GIF89a"}, {}, "source: not a readable image"),
        ({"source": b""}, {}, "source: not a readable image"),
        ({}, {"sead": "1"}, "a form has no 'sead'"),
        ({}, {"seed": "-1"}, "seed is -1"),
        ({}, {"seed": "x"}, "seed is 'x', which is no value of it"),
        ({}, {"steps": "5000"}, "steps is 5000; it must be from 1 to 200"),
        ({}, {"guidance": "nan"}, "guidance is nan"),
        ({}, {"model": "../../etc"}, "there is no model '../../etc'"),
        ({}, {"parsing": "/etc/passwd"}, "parsing is '/etc/passwd'"),
        ({}, {"sampler": "euler"}, "sampler is 'euler'"),
        ({}, {"person": "2"}, "--person=2, but people found: 1"),
        ({}, {"pose_person": "0"}, "--person=0, but people found: 1"),
        ({}, {"seed": "1" * 30_000}, "exceeded maximum size"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(client, files, form, words):
    sent = {k: (k, v[1] if k not in files else files[k]) for k, v in two().items() if files.get(k, 0) is not None}
    answer = client.post("/v1/repose", files=sent or {"x": b""}, data=form)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words.lower() in error.lower() and "\n" not in error and len(error) < 300, error


def test_health_and_headers(client):
    answer = client.get("/health")
    assert answer.json() == {"status": "ok", "models": [head_run().name]}
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert client.get("/docs").status_code == 404
    assert "32x24 pixels, step 7" in about(engine().runs[head_run().name])


def test_bounds(client, monkeypatch):
    """Length, and how many wait; the place comes back however a request ends."""
    monkeypatch.setattr(api, "MOST_BYTES", 1000)
    assert client.post("/v1/repose", files=two()).status_code == 413
    monkeypatch.undo()
    assert client.post("/v1/repose", content=iter([b"x"])).status_code == 411
    places = engine()._places
    for _ in range(WAITING + 1):
        assert places.acquire(blocking=False), "every request so far has given its place back"
    try:
        answer = client.post("/v1/repose", files=two())
        assert answer.status_code == 429 and answer.headers["retry-after"] and "try again" in answer.json()["error"]
    finally:
        places.release(WAITING + 1)
    with pytest.raises(InputError, match="num is 9"):
        Ask(None, None, num=9)


def test_no_path_of_a_request_reaches_the_disk(client, folder):
    up = client.post("/gradio_api/upload", files={"files": ("../../../evil.png", photo(5), "image/png")})
    if up.status_code == 200:
        (path,) = up.json()
        assert path.startswith(str(folder)) and ".." not in path
    assert not list(folder.parent.glob("evil*"))
    for path in ("/etc/passwd", f"{folder}/../../x", str(head_run() / "metadata.json")):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path


def test_what_the_program_refuses(capsys, monkeypatch, refuses):
    for flags, words in (
        (["--host=nowhere"], "cannot listen there"),
        (["--port=99999"], "cannot listen there"),
        (["--port=0", "--waiting=-1"], "--waiting is -1"),
        (["--port=0", "--workdir=/gone"], "no such folder"),
        (["--port=0", f"--workdir={head_run()}", f"--workdir={head_run()}"], "is called run already"),
    ):
        refuses(words, program.main, *flags)
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    assert program.main(["--port=0"]) == 2 and "pip install -e '.[web,pose]'" in capsys.readouterr().err
