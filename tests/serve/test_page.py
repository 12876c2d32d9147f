"""The page in a real browser: two photos, a dragged joint, pictures; and what it says where something is missing."""

import io
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the [web] extra is not installed")
pytest.importorskip("ai_edge_litert", reason="the [pose] extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium here (apt install chromium)", allow_module_level=True)

from PIL import Image  # noqa: E402

from input_pipeline.annotations.photo import decode_photo  # noqa: E402
from tests.serve.server import engine, photo, running  # noqa: E402
from truepose_jax.serve.engine import Ask  # noqa: E402

pytestmark = pytest.mark.usefixtures("started_quickly")
PHOTO = decode_photo(photo(5), name="")
SLOW = 60_000
"""Milliseconds that a busy machine may take for a step."""


@pytest.fixture(scope="module")
def url(tmp_path_factory, started_quickly):
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        engine().make(Ask(lambda: PHOTO, lambda: PHOTO))  # compiled before a browser waits for it
        with running(folder) as found:
            yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, url):
    """Open, with whatever it asked of anybody else, and whatever went wrong in it."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(SLOW)
    page.elsewhere, page.errors = [], []
    page.on(
        "request", lambda r: page.elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None
    )
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#go")
    yield page
    page.close()


def png_file(name: str, content: bytes) -> dict:
    return {"name": name, "mimeType": "image/png", "buffer": content}


def picture_of(page, before: str = "") -> tuple[str, bytes]:
    """(address, bytes) of the picture that comes in the place of the one at `before`."""
    page.click("#go")
    shown = page.wait_for_function(
        "before => { const i = document.querySelector('#pictures img'); return i && i.src != before ? i.src : null }",
        arg=before,
    )
    return shown.json_value(), page.request.get(shown.json_value()).body()


def test_two_photos_and_a_dragged_joint(page, url):
    page.set_input_files("#photo input[type=file]", png_file("me.png", photo(5)))
    page.wait_for_selector("#regions img")
    page.set_input_files("#pose input[type=file]", png_file("other.png", photo(3)))
    page.wait_for_selector("#editor circle")
    assert page.locator("#editor circle").count() == 18 and "18 of 18 joints, front view" in page.inner_text(
        "#said_of_pose"
    )
    address, first = picture_of(page)
    files = {"source": png_file("a.png", photo(5)), "pose": png_file("b.png", photo(3))}
    assert page.request.post(f"{url}/v1/repose", multipart=files).body() == first, (
        "the page's bytes are those of the API"
    )

    wrist = page.locator('#editor circle[data-joint="4"]')
    box, before = wrist.bounding_box(), json.dumps(wrist.get_attribute("cy"))
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 15, box["y"] - 150, steps=3)
    page.mouse.up()
    page.wait_for_function(f"document.querySelector('#editor circle[data-joint=\"4\"]').getAttribute('cy') != {before}")
    _, second = picture_of(page, address)
    one, other = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (first, second))
    assert one.shape == other.shape and np.abs(one - other).max() > 1, "the picture changes with the joint"
    page.locator('#editor circle[data-joint="7"]').dblclick()
    page.wait_for_function("document.querySelectorAll('#editor circle').length == 17")
    assert not page.elsewhere and not page.errors


def test_it_says_what_is_missing(page):
    page.click("#go")
    page.get_by_text("Give a photo and a pose first.").first.wait_for()
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    page.set_input_files("#pose input[type=file]", png_file("noise.png", stream.getvalue()))
    page.get_by_text("the pose photo: nobody found").first.wait_for()
    assert not page.elsewhere
