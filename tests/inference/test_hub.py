"""from_pretrained, save_pretrained, push_to_hub: huggingface_hub's own client against a hub that this test plays."""

import base64
import hashlib
import http.server
import json
import re
import threading

import numpy as np
import pytest

from input_pipeline.schema import InputError
from tests.tiny_run import shared_pipeline, shared_run
from truepose_jax.inference import hub
from truepose_jax.inference.pipeline import Pipeline
from truepose_jax.pretrained.conversion.key_maps import leaves
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError
from truepose_jax.runtime.bundled import SHIPPED

pytestmark = pytest.mark.usefixtures("started_quickly")
COMMIT = "0" * 39 + "1"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository in memory: made, filled by one commit, listed, read."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, body: bytes, status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        files, calls = self.server.files, self.server.calls
        calls.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            self._answer(json.dumps({"url": f"{self.server.url}/{self.server.repo}"}).encode())
        elif self.path.endswith("/preupload/main"):
            asked = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]
            ]
            self._answer(json.dumps({"files": asked}).encode())
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    self.server.said = line["value"]["summary"]
            url = f"{self.server.url}/{self.server.repo}/commit/{COMMIT}"
            self._answer(json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())
        else:
            self._answer(b"{}")

    def do_GET(self):
        files, repo = self.server.files, self.server.repo
        read = re.fullmatch(rf"/{repo}/resolve/\w+/(.+)", self.path)
        if read and read[1] in files:
            body = files[read[1]]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self._answer(body, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")
        elif self.path.startswith(f"/api/models/{repo}/tree/") and files:
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
            self._answer(json.dumps(listed).encode())
        elif self.path.startswith(f"/api/models/{repo}") and files:
            siblings = [{"rfilename": name} for name in files]
            self._answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self._answer(b'{"error": "none"}', 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch, tmp_path):
    from huggingface_hub import constants

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.url, found.repo = f"http://127.0.0.1:{found.server_port}", "me/poses"
    found.files, found.calls, found.said = {}, [], ""
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def same_parameters(one: Pipeline, other: Pipeline) -> bool:
    mine, theirs = dict(leaves(one.params)), dict(leaves(other.params))
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[path], theirs[path]) for path in mine)


def test_pushed_and_fetched(server, tmp_path):
    pipe = shared_pipeline()
    assert (
        pipe.push_to_hub(server.repo, private=True, token="hf_secret") == f"{server.url}/{server.repo}/commit/{COMMIT}"
    )
    assert server.calls[0] == ("/api/repos/create", "Bearer hf_secret")
    assert server.said == "Step 7, ema weights"
    kinds = {name.rpartition(".")[2] for name in server.files}
    assert kinds == {"json", "safetensors", "md"} and "target_net/config.json" in server.files
    card = server.files["README.md"].decode()
    assert "pipeline_tag: image-to-image" in card and "license: apache-2.0" in card and "# TruePose, 32x24" in card
    fetched = Pipeline.from_pretrained(server.repo, revision="main")
    assert same_parameters(pipe, fetched) and fetched.run.step == 7

    fetched.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == server.files[path.relative_to(tmp_path / "again").as_posix()], path
    with pytest.raises(ConversionError, match="copied as it is"):
        fetched.save_pretrained(tmp_path / "narrow", dtype="float16")


def test_names_and_folders(server, tmp_path):
    assert hub.fetch(shared_run()) == str(shared_run()) and hub.fetch(SHIPPED.name) == str(SHIPPED)
    pipe = shared_pipeline()
    pipe.save_pretrained(tmp_path / "half", dtype="bfloat16")
    assert "target_net" in {path.name for path in (tmp_path / "half").iterdir()}
    with pytest.raises(ConversionError, match="is there already"):
        pipe.save_pretrained(tmp_path / "half")
    server.files["README.md"] = b"# another model"
    for name, words in (
        ("nowhere", "nor a name on the hub"),
        (server.repo, "is no model that save_pretrained"),
        ("you/poses", "not to be had from the hub"),
    ):
        with pytest.raises(InputError, match=words):
            hub.fetch(name)
    with pytest.raises(InputError, match="a revision is of a repository"):
        hub.fetch(shared_run(), revision="main")
    with pytest.raises(InputError, match="OWNER/NAME"):
        pipe.push_to_hub("poses")
