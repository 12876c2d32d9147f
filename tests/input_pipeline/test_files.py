"""What a name from outside may be, and what comes of it: bytes, text, JSON, lists, pictures, places."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from input_pipeline import files
from input_pipeline.annotations import photo
from input_pipeline.annotations.keypoints import load_pose, read_annotations
from input_pipeline.annotations.parsing import label_set, read_parsing
from input_pipeline.annotations.photo import MAX_CHUNKS, decode_photo, read_photo
from input_pipeline.atomic import write_text
from input_pipeline.records.reader import read_json as read_json_of_build
from input_pipeline.schema import InputError, UserError
from input_pipeline.sources.folder import read_pairs
from truepose_jax.evaluate.pairing import image_size
from truepose_jax.inference.csv_requests import read_rows
from truepose_jax.pretrained.conversion.safetensors_io import ConversionError, open_source
from truepose_jax.runtime.cli import run_program
from truepose_jax.training.checkpoint import CheckpointError, read_metadata

ROOT = pathlib.Path(__file__).resolve().parents[2]
READERS = {
    "photo": read_photo,
    "map": lambda path: read_parsing(path, label_set("atr18"), (4, 4)),
    "size": lambda path: image_size(path, upright=True),
    "JSON": files.read_json,
    "JSON of a build": lambda path: read_json_of_build(pathlib.Path(path)),
    "text": lambda path: files.read_text(path, "a text"),
    "list": files.read_list,
    "pairs": read_pairs,
    "rows to generate": lambda path: read_rows(path, pathlib.Path("out"), labels=None, pose_frame=None),
    "annotations": read_annotations,
    "safetensors": open_source,
    "metadata of a run": lambda path: read_metadata(pathlib.Path(path).parent),
}


def refused(call, *arguments, error=UserError) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text and "\n" not in text, text
    return text


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_plain_file_is_one_line_and_never_waited_for(tmp_path, reader):
    """A pipe nobody writes into, a device without an end, a circle of links, a folder, nothing, a name of 300 letters."""
    name = "metadata.json" if reader == "metadata of a run" else "file"
    places = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p)}
    for kind, make in (places | {"circle": lambda p: os.symlink(p, p)}).items():
        path = tmp_path / kind / name
        path.parent.mkdir()
        make(path)
        assert str(path) in refused(READERS[reader], str(path)), kind
    for path in (tmp_path / "absent" / name, tmp_path / ("long" * 75) / name, f"{tmp_path}/nul\0/{name}"):
        if reader != "metadata of a run" or "\0" not in str(path):
            refused(READERS[reader], str(path), error=(UserError, OSError, ValueError))  # run_program: one line


BAD_JSON = {
    "deep": "[" * 100_000,
    "not a number": '{"a": NaN}',
    "endless": '{"a": -Infinity}',
    "large": '{"a": 1e999}',
    "400 digits": '{"a": ' + "9" * 400 + "}",
    "bytes": b"\xff\xfe\x00",
    "cut": '{"a": [1, 2',
    "empty": "",
    "a web page": "<!DOCTYPE html><html></html>",
    "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_lies_is_one_line_for_every_reader(tmp_path, kind):
    path = tmp_path / "metadata.json"
    path.write_bytes(BAD_JSON[kind] if isinstance(BAD_JSON[kind], bytes) else BAD_JSON[kind].encode())
    assert str(path) in refused(files.read_json, path)
    refused(read_metadata, tmp_path, error=CheckpointError)
    pose = tmp_path / "pose.json"
    pose.write_bytes(path.read_bytes())
    refused(load_pose, pose, error=InputError)
    if kind == "a pointer":
        assert "git lfs pull" in refused(files.read_json, path)


def test_json_is_of_the_form_that_is_asked_for():
    form = {"step": int, "rate?": float, "names": [str], "sums": {str: int}, "size": (list, type(None))}
    good = {"step": 1, "rate": 2, "names": ["a"], "sums": {"a": 1}, "size": None, "more": object}
    files.check_form(good, form)
    files.check_form({key: value for key, value in good.items() if key != "rate"}, form)
    for bad, where in (
        ([], "it is a list, not an object"),
        (good | {"step": True}, "step is true or false, not a whole number"),
        (good | {"step": None}, "step is null"),
        (good | {"rate": "2"}, "rate is a text, not a number"),
        (good | {"names": ["a", 1]}, r"names\[1\] is a whole number"),
        (good | {"sums": {"a": {}}}, "sums.a is an object"),
        ({"rate": 1.0}, "has no 'step'"),
    ):
        with pytest.raises(ValueError, match=where):
            files.check_form(bad, form)
    assert files.parse_json('{"a": [1, -2.5e3, true, null]}') == {"a": [1, -2500.0, True, None]}


def test_size_is_bounded_before_it_is_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10 << 20)
    with pytest.raises(InputError, match=r"cannot read the photo \(it is larger than 1 MiB"):
        files.read_bytes(path, "a photo", limit=1 << 20)


def test_lists_part_cells_by_what_their_first_line_has(tmp_path):
    for name, mark in (("comma", ","), ("semicolon", ";"), ("tab", "\t")):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"\ufefffrom{mark} to\n\na 1.jpg{mark}b.jpg\n", encoding="utf-8")
        assert files.read_list(path) == [(1, ["from", "to"]), (3, ["a 1.jpg", "b.jpg"])]
        assert read_pairs(path) == [("a 1.jpg", "b.jpg")]


def test_names_stay_in_their_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "away").symlink_to(tmp_path)
    assert files.place_in(folder, "a/../b.png", "out") == folder / "b.png"
    for name, words in (
        ("../b.png", "leaves the folder"),
        ("away/b.png", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        ("circle/b.png", "circle"),
        ("a\0b.png", "no name of a file"),
        ("a" * 256, "longer than"),
    ):
        assert words in refused(files.place_in, folder, name, "out")
    write_text(folder / ("n" * 255), "the longest name there is")
    assert (folder / ("n" * 255)).is_file()


def test_a_row_that_is_bad_does_not_end_the_list(tmp_path):
    """NUL, a circle of links and a name that is too long are their rows' errors."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "loop").symlink_to(out / "loop")
    names = ["good.png", "a\0b.png", "loop/x.png", "x" * 300 + ".png", "../x.png"]
    path = tmp_path / "list.csv"
    path.write_text("source,parsing,pose,out\n" + "".join(f"a.png,none,b.json,{name}\n" for name in names))
    rows, problems = read_rows(str(path), out, labels=None, pose_frame=None)
    assert [row.out.name for row in rows] == ["good.png"] and [line for line, _ in problems] == [3, 4, 5, 6]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    made = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def test_pictures_of_other_kinds_are_named_and_reach_no_other_program(tmp_path):
    """PostScript under a photo's name would start Ghostscript."""
    gif = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(gif, "GIF")
    for data, words in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is PostScript"),
        (gif.getvalue(), "it is a GIF"),
        (b"", "it is empty"),
        (b"<html><body>404</body></html>", "a web page"),
        (b"\0\0\0\x1cftypheic" + bytes(20), "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        path = tmp_path / "photo.png"
        path.write_bytes(data)
        assert words in refused(read_photo, path) and str(path) in refused(read_photo, path)
        assert words in refused(READERS["size"], path)


def test_pillow_is_asked_in_one_place():
    """Elsewhere it would try every format that it knows."""
    for folder in ("truepose_jax", "input_pipeline"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "photo.py" or "Image.open(" not in path.read_text(), path
    assert "formats=FORMATS" in (ROOT / "input_pipeline/annotations/photo.py").read_text()


def test_a_png_of_too_many_chunks_is_refused_at_once():
    header = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    data = png(header, *[(b"tEXt", b"a\0b")] * MAX_CHUNKS, (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b""))
    assert "chunks" in refused(lambda: decode_photo(data, name="many"))


def test_jpegs_with_bytes_before_their_end_are_read_as_pillow_does():
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    whole = file.getvalue()
    wanted = decode_photo(whole, name="whole")
    for data in (whole[:-2] + bytes(8) + whole[-2:], whole + b"behind the end"):
        assert (decode_photo(data, name="padded") == wanted).all()
    assert "truncated" in refused(lambda: decode_photo(whole[:-40], name="cut"))


def test_safetensors_follow_the_official_rules(tmp_path):
    """What the official reader refuses, in one line: also two tensors on the same bytes."""

    def file(header, data=bytes(8)):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    def entry(start=0, end=4, shape=(1,), dtype="F32"):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}

    assert set(open_source(file({"b": entry(4, 8), "a": entry(0, 4), "__metadata__": {"format": "pt"}})).infos) == {
        "a",
        "b",
    }
    bad = {
        "a list": [],
        "overlapping": {"a": entry(), "b": entry(), "c": entry(4, 8)},
        "a hole": {"a": entry(4, 8)},
        "rest": {"a": entry(0, 4)},
        "null offsets": {"a": entry() | {"data_offsets": None}},
        "three offsets": {"a": entry() | {"data_offsets": [0, 4, 8]}},
        "texts": {"a": entry() | {"data_offsets": ["0", "4"]}},
        "huge": {"a": entry(0, 10**30, (10**30,))},
        "large": {"a": entry(0, 2**62, (2**60,))},
        "negative": {"a": entry(-4, 0)},
        "negative shape": {"a": entry(0, 8, (-1, -2))},
        "backwards": {"a": entry(8, 0)},
        "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
        "dtype of a list": {"a": entry() | {"dtype": ["F32"]}},
        "shape of texts": {"a": entry() | {"shape": ["1"]}},
        "an entry of a number": {"a": 3},
        "metadata of a number": {"__metadata__": 3},
        "no utf-8": b'{"\xff": 1}',
        "deep": b'{"a":' * 100_000,
        "not a number": b'{"a": NaN}',
    }
    for kind, header in bad.items():
        assert refused(open_source, file(header), error=ConversionError), kind
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refused(open_source, huge, error=ConversionError)
    huge.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(open_source, huge, error=ConversionError)


def test_names_with_control_characters_are_one_line(tmp_path):
    text = refused(read_photo, tmp_path / "a\nb\x1b[31m.png")
    assert r"a\nb\x1b[31m.png" in text
    assert str(ConversionError("two\nlines")) == "two\nlines"  # of a list of tensors


def test_words_of_the_system_are_one_line_and_bugs_keep_their_tracebacks(tmp_path, capsys):
    def fails(error):
        def main(argv):
            raise error

        return lambda: run_program(main, [])

    def opens(argv):
        (tmp_path / "absent\n").read_text()

    assert run_program(opens, []) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert fails(OSError(5, "Input/output error", 3))() == 2 and capsys.readouterr().err.startswith("error: 3: Input/output")
    assert fails(MemoryError("3 EiB"))() == 2 and "not enough memory" in capsys.readouterr().err
    for bug in (OSError("of nothing"), KeyError("a"), RuntimeError("b")):
        with pytest.raises(type(bug)):
            fails(bug)()


def test_a_full_standard_output_is_one_line():
    code = "import sys; from truepose_jax.runtime.cli import run_program as run\nsys.exit(run(lambda _: print(1, flush=%s), []))"
    for flush in (True, False):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code % flush],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                timeout=60,
            )
        assert done.returncode == 2, done.stderr
        assert done.stderr == "error: cannot write to the standard output (No space left on device)\n"


def test_what_first_bytes_show():
    assert files.looks_like(b"PK\x03\x04") == "a zip archive (or a PyTorch file)" and files.looks_like(b"hello") == ""


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB"])
def test_colours_are_converted_in_strips_to_the_same_pixels(monkeypatch, mode):
    """Turned by EXIF and with transparency, as Pillow converts the whole picture."""
    monkeypatch.setattr(photo, "STRIP", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 4), dtype=np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[photo.EXIF_ORIENTATION] = 6
    Image.fromarray(pixels).convert(mode).save(file, "PNG", exif=exif)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGBA")
    wanted = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    np.testing.assert_array_equal(decode_photo(file.getvalue(), name="turned"), np.asarray(wanted))
