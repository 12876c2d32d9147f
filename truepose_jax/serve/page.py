"""The page: two photos, what was found in them, a skeleton to drag, settings, pictures."""

from __future__ import annotations

import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from input_pipeline.annotations.photo import one_line, read_photo
from input_pipeline.schema import UserError
from input_pipeline.synthetic.people import SyntheticPeople
from truepose_jax.detection.embedded import LABELS, find_person
from truepose_jax.inference.found_sheet import regions_over
from truepose_jax.inference.photo_requests import PhotoOptions
from truepose_jax.inference.pipeline import Run
from truepose_jax.runtime.bundled import SHIPPED
from truepose_jax.runtime.choices import SAMPLERS
from truepose_jax.serve.api import joints_of
from truepose_jax.serve.editor import ON_LOAD, TEMPLATE, editor_value
from truepose_jax.serve.engine import MOST_PICTURES, MOST_STEPS, Ask, Busy, Engine, png

EXAMPLES = ((2, 3), (0, 3), (3, 5))
"""Pairs of drawn people to begin with."""
BUTTONS = ["download", "fullscreen"]
"""Of pictures; Gradio's others share them with its hub."""


def about(run: Run) -> str:
    """Markdown: what a model is, and what it is not."""
    h, w = run.config.model.size
    text = f"**{pathlib.Path(run.workdir).name}**: pictures of {h}x{w} pixels, step {run.step:,}."
    if pathlib.Path(run.workdir) == SHIPPED:
        text += (
            " The small model that comes along has seen *drawn* people only: on photos clothes arrive in blocks of colour, faces"
            " do not arrive, and backs are guessed. It is here to be tried, not to be believed."
        )
    return text + " Nothing leaves this machine."


def make_page(engine: Engine, folder: pathlib.Path) -> gr.Blocks:
    """folder: of this server, where its examples and pictures lie while it runs."""
    names = list(engine.runs)

    def look_at_photo(path: str | None) -> tuple[np.ndarray | None, str]:
        if path is None:
            return None, ""
        photo, found = _found(path, "the photo")
        return regions_over(photo, found.parsing, LABELS), found.about

    def look_at_pose(path: str | None) -> tuple[dict | None, str]:
        if path is None:
            return None, ""
        photo, found = _found(path, "the pose photo")
        return editor_value(photo, found.joints), found.about

    def make(path, value, model, steps, guidance, sampler, seed, num, crop, align, progress=gr.Progress()):  # noqa: B008
        if path is None or not value:
            raise gr.Error("Give a photo and a pose first.")
        try:
            joints, frame = _pose_of(value)
            ask = Ask(
                lambda: read_photo(path),
                lambda: joints,
                frame_hw=frame,
                model=str(model),
                seed=int(seed),
                num=int(num),
                steps=int(steps),
                guidance=float(guidance),
                sampler=str(sampler),
                options=PhotoOptions(crop=bool(crop), align=bool(align)),
            )
            progress(0, desc="waiting, looking, compiling")
            pictures = engine.make(ask, lambda done, of: progress((done, of), desc="drawing", unit="steps"))
        except (UserError, Busy) as error:
            raise gr.Error(one_line(error)) from error
        return [(_kept(folder, picture), f"seed {ask.seed + i}") for i, picture in enumerate(pictures)]

    def defaults(model: str):
        run = engine.runs[model]
        sampling = run.sampling()
        return about(run), sampling.steps, sampling.guidance, sampling.sampler

    first = defaults(names[0])
    with gr.Blocks(title="truepose-jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# A person in another pose")
        said_of_model = gr.Markdown(first[0], elem_id="about")
        photo_of = dict(type="filepath", image_mode=None, sources=["upload"], height=280)
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="1. A photo of the person", elem_id="photo", **photo_of)
                regions = gr.Image(
                    label="Regions found in it", interactive=False, height=280, elem_id="regions", buttons=BUTTONS
                )
                said = gr.Markdown(elem_id="said")
            with gr.Column():
                pose = gr.Image(label="2. A photo of the pose", elem_id="pose", **photo_of)
                editor = gr.HTML(html_template=TEMPLATE, js_on_load=ON_LOAD, value=None, elem_id="editor")
                said_of_pose = gr.Markdown(elem_id="said_of_pose")
            with gr.Column():
                go = gr.Button("3. Make the picture", variant="primary", elem_id="go")
                pictures = gr.Gallery(
                    label="Pictures",
                    format="png",
                    height=420,
                    elem_id="pictures",
                    object_fit="contain",
                    buttons=BUTTONS,
                )
                model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                    num = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures")
                with gr.Row():
                    crop = gr.Checkbox(True, label="Cut the person out, put the picture back")
                    align = gr.Checkbox(False, label="Keep the person's limb lengths and place")
                with gr.Accordion("Sampling", open=False):
                    steps = gr.Slider(1, MOST_STEPS, first[1], step=1, label="Steps")
                    guidance = gr.Slider(0, 10, first[2], step=0.5, label="Guidance (1: none)")
                    sampler = gr.Dropdown(list(SAMPLERS), value=first[3], label="Sampler")
        gr.Examples(_examples(folder), [photo, pose], label="Drawn people to try", cache_examples=False)
        photo.change(look_at_photo, photo, [regions, said], api_name=False)
        pose.change(look_at_pose, pose, [editor, said_of_pose], api_name=False)
        model.change(defaults, model, [said_of_model, steps, guidance, sampler], api_name=False)
        asked = [photo, editor, model, steps, guidance, sampler, seed, num, crop, align]
        go.click(make, asked, pictures, api_name=False, concurrency_limit=None, show_progress_on=pictures)
    return page


def _found(path: str, name: str):
    try:
        photo = read_photo(path)
        return photo, find_person(photo, name=name)
    except UserError as error:
        raise gr.Error(one_line(error).replace(path, name)) from error


def _pose_of(value: Mapping[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """(joints, frame) of an editor's value, which a client may have made up. Raises InputError."""
    frame = value.get("h"), value.get("w")
    return joints_of(value.get("joints"), frame), frame


def _kept(folder: pathlib.Path, picture: np.ndarray) -> str:
    """The picture's own bytes as a file, so that a download is what `generate` writes."""
    path = folder / f"{uuid.uuid4().hex}.png"
    path.write_bytes(png(picture))
    return str(path)


def _examples(folder: pathlib.Path) -> list[list[str]]:
    people = SyntheticPeople(
        seed=5, split="train", identities=6, poses_per_identity=1, size=(384, 288), background="plain"
    )
    files = {}
    for i in sorted({i for pair in EXAMPLES for i in pair}):
        files[i] = str(folder / f"example_{i}.png")
        Image.fromarray(people.image(i).image).save(files[i])
    return [[files[a], files[b]] for a, b in EXAMPLES]
