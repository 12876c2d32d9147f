"""The loader over records: what it gives, on any number of hosts, threads and processes, and when records are broken."""

import itertools
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline.annotations.grey_png import decode_grey_png, encode_grey_png
from input_pipeline.annotations.parsing import LABEL_SETS
from input_pipeline.annotations.regions import region_boxes
from input_pipeline.annotations.run_lengths import decode_runs, encode_runs
from input_pipeline.batches.loader import make_loader
from input_pipeline.batches.readers import RecordTokens
from input_pipeline.records.annotate import rewrite_records
from input_pipeline.records.reader import RecordImages
from input_pipeline.records.schema import RecordWriter, pack_latents, pack_tokens
from input_pipeline.schema import InputError
from tests.process import run
from tests.records import built, pair_layout

SIZE, WIDTH = (32, 24), 8


def annotated(folder):
    """Built noise with tokens and latents that are functions of the image and of whether it is mirrored."""
    root = built(folder, shard_records=3)

    def fill(records, labels):
        found = []
        for record in records:
            random = np.random.default_rng(int(record.name[1:]))
            valid = region_boxes(record.parsing, LABEL_SETS[labels])[1]
            fields = {"latents_size": np.array(SIZE, np.int32)}
            for kind in ("", "flipped_"):
                tokens = random.standard_normal((21, WIDTH)).astype(np.float32)
                fields[f"{kind}region_tokens"], fields[f"{kind}region_valid"] = pack_tokens(tokens, valid)
                fields[f"{kind}latents"] = pack_latents(*random.standard_normal((2, 4, 3, 4)))
            found.append(fields)
        return found

    said = {"fingerprint": "f", "size": list(SIZE), "flipped": True}
    assert rewrite_records(root, {"clip": said | {"width": WIDTH}, "vae": said}, fill, size=SIZE) == 0
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return annotated(tmp_path_factory.mktemp("records") / "r")


@pytest.fixture(scope="module")
def images(root):
    return RecordImages(root, "train", size=SIZE)


LAYOUTS = {
    "float32": pair_layout(width=WIDTH),
    "uint8": pair_layout("uint8", maps=False, width=WIDTH),
    "uint8+maps": pair_layout("uint8", width=WIDTH),
    "latents": pair_layout("latents", maps=False, width=WIDTH),
}


def batches(images, count, form="float32", **settings):
    settings = {"seed": 1, "batch_size": 8, "flip": True} | settings
    loader = make_loader(images, RecordTokens(images, WIDTH, True), LAYOUTS[form], **settings)
    return list(itertools.islice(loader, count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("form", ["uint8", "uint8+maps"])
def test_bytes_are_the_floats_before_they_are_floats(images, form):
    for floats, compact in zip(batches(images, 6), batches(images, 6, form=form), strict=True):
        LAYOUTS["float32"].check(floats)
        LAYOUTS[form].check(compact)
        assert floats.keys() - compact.keys() == ({"target_parsing"} if form == "uint8" else set())
        for name in compact:
            wanted = floats[name]
            if compact[name].dtype == np.uint8 and not name.endswith("_parsing"):
                wanted = np.rint(wanted * 255) if name == "target_pose" else np.rint((wanted + 1) * 127.5)
            np.testing.assert_array_equal(compact[name], wanted, err_msg=name)


def test_moments_are_the_stored_latents_of_the_side_that_enters(images):
    """Everything but the photos is as without latents; the photos' rows are the images' own latents."""
    places = {}
    for index in range(len(images)):
        fields = images.fields(index)
        for flip, kind in ((False, "latents"), (True, "flipped_latents")):
            mean, log_variance = np.frombuffer(fields[kind], np.float16).reshape(2, 4, 3, 4)
            places[np.concatenate([mean, log_variance], -1).tobytes()] = index, flip
    seen = set()
    for compact, moments in zip(batches(images, 12, form="uint8"), batches(images, 12, form="latents"), strict=True):
        LAYOUTS["latents"].check(moments)
        for name in moments.keys() - {"source", "target"}:
            np.testing.assert_array_equal(moments[name], compact[name], err_msg=name)
        for row in range(8):
            source, target = (places[moments[part][row].tobytes()] for part in ("source", "target"))
            assert source[1] == target[1] and (source[0], target[0]) in set(map(tuple, images.pairs.tolist()))
            photo = images.image(source[0]).image
            np.testing.assert_array_equal(compact["source"][row], photo[:, ::-1] if source[1] else photo)
            seen.add(source[1])
    assert seen == {False, True}


PROGRAM = '''
import itertools, multiprocessing, os, signal, sys, threading, time, zlib
import absl.flags
from input_pipeline.batches.loader import make_loader
from input_pipeline.batches.readers import RecordTokens
from input_pipeline.records.reader import RecordImages
from tests.records import pair_layout

def interrupt_at_birth(workers):
    """As Ctrl-C and the end of a whole job step do, before a worker has imported anything."""
    told = set()
    while len(told) < workers:
        for child in set(multiprocessing.active_children()) - told:
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
            told.add(child)
        time.sleep(0.001)

if __name__ == "__main__":
    absl.flags.FLAGS.mark_as_parsed()
    images = RecordImages(sys.argv[1], "train", size=(32, 24))
    layout = pair_layout("uint8", maps=False)
    for workers in (0, 2):
        loader = make_loader(
            images, RecordTokens(images, 8, True), layout, seed=1, batch_size=8, flip=True, workers=workers
        )
        threading.Thread(target=interrupt_at_birth, args=[workers], daemon=True).start()
        found = [next(loader)]
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        found += itertools.islice(loader, 14)
        assert len(children) == workers and all(child.is_alive() for child in children)
        print(*(zlib.crc32(b"".join(batch[name].tobytes() for name in sorted(batch))) for batch in found))
    print(*(child.pid for child in children))
'''


def test_worker_processes_change_nothing(root, tmp_path):
    """And go on when they are asked to end together with the trainer, until the trainer does."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    code, out, errors = run(program, root)
    assert code == 0, errors
    lines = out.splitlines()
    assert len(lines) == 3 and lines[0] == lines[1] and len(set(lines[0].split())) == 15
    assert not any(os.path.exists(f"/proc/{pid}") for pid in lines[2].split())


def test_a_broken_record_keeps_its_slot_and_is_named(root, tmp_path, caplog):
    """Its photo, its map or its latents: the rows that need them weigh nothing, the others are untouched."""
    images = RecordImages(root, "train", size=SIZE)
    good = batches(images, 10, form="uint8")
    spoiled = {**images.fields(1)}
    spoiled["image"] = spoiled["image"][: len(spoiled["image"]) // 2]
    data = RecordWriter().serialise(spoiled)
    images._bytes = lambda index, bytes_of=images._bytes: data if index == 1 else bytes_of(index)
    bad = batches(images, 10, form="uint8")
    lost = 0
    for a, b in zip(good, bad, strict=True):
        for row in range(8):
            if b["valid"][row]:
                np.testing.assert_array_equal(a["target"][row], b["target"][row])
            else:
                lost += 1
                assert not b["target"][row].any() and not b["target_pose"][row].any()
    assert lost > 0
    (line,) = {record.getMessage() for record in caplog.records}
    assert "record 1 (p001)" in line and "weigh nothing" in line
    assert all(b["valid"].all() for b in batches(images, 4, form="latents")), "latents do not need the photo"


def test_a_target_needs_its_map_only_where_the_batch_has_maps(root):
    """Record 1 as a target counts without a map in "uint8", and weighs nothing in "uint8+maps"."""
    images = RecordImages(root, "train", size=SIZE)
    data = RecordWriter().serialise({**images.fields(1), "parsing": b"no picture"})
    images._bytes = lambda index, bytes_of=images._bytes: data if index == 1 else bytes_of(index)
    bare, mapped = (batches(images, 10, form=form) for form in ("uint8", "uint8+maps"))
    lost = [int((a["valid"] - b["valid"]).sum()) for a, b in zip(bare, mapped, strict=True)]
    assert sum(lost) > 0 and min(lost) >= 0 and sum(b["valid"].sum() for b in mapped) > 40
    for batch in mapped:
        assert np.all(batch["target_parsing"].any(axis=(1, 2)) == (batch["valid"] > 0))


def test_what_is_refused(images):
    with pytest.raises(InputError, match="region tokens of 8; expected 9"):
        RecordTokens(images, 9, True).of(0, flip=False)
    with pytest.raises(InputError, match="mirrored"):
        make_loader(images, RecordTokens(images, WIDTH, False), LAYOUTS["uint8"], seed=0, batch_size=4, flip=True)
    other = RecordImages(images.root, "train", size=(40, 24))
    (batch,) = batches(other, 1, form="latents")
    assert not batch["valid"].any(), "latents of another size"


@pytest.mark.parametrize("hw", [(1, 1), (7, 13), (64, 48)])
def test_grey_png_is_a_png(tmp_path, hw):
    grey = np.random.default_rng(0).integers(0, 256, hw, dtype=np.uint8)
    data = encode_grey_png(grey)
    (tmp_path / "x.png").write_bytes(data)
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), grey)
    np.testing.assert_array_equal(decode_grey_png(data, max_pixels=10**6), grey)
    assert decode_grey_png(data, max_pixels=grey.size - 1) is None


@pytest.mark.parametrize("hw", [(1, 1), (7, 13), (300, 230)])
def test_run_lengths_come_back(hw):
    """Noise, stripes and runs of more than 65,535 cells; what is cut off, spoiled, larger or of another kind is nobody's."""
    noise = np.random.default_rng(0).integers(0, 256, hw, dtype=np.uint8)
    for grey in (noise, noise // 128, np.zeros(hw, np.uint8), noise[:, ::-1] // 100):
        data = encode_runs(grey)
        np.testing.assert_array_equal(decode_runs(data, max_pixels=10**6), grey)
        assert decode_runs(data, max_pixels=grey.size - 1) is None
        assert decode_runs(data[:-1], max_pixels=10**6) is None and decode_grey_png(data, max_pixels=10**6) is None
    for place in range(len(data)) if hw == (7, 13) else ():
        spoiled = bytearray(data)
        spoiled[place] ^= 0x55
        found = decode_runs(bytes(spoiled), max_pixels=10**6)
        assert found is None or np.array_equal(found, grey)
    assert decode_runs(encode_grey_png(noise), max_pixels=10**6) is None and decode_runs(b"runs", max_pixels=10) is None


def test_maps_of_older_builds_are_read(root, tmp_path):
    """PNGs in the records, as they were written before run lengths."""
    images = RecordImages(root, "train", size=SIZE)
    fields = {**images.fields(1)}
    map_ = images.image(1).parsing
    stored = decode_runs(fields["parsing"], max_pixels=10**6)
    data = RecordWriter().serialise(fields | {"parsing": encode_grey_png(stored)})
    images._bytes = lambda index: data
    np.testing.assert_array_equal(images.image(1).parsing, map_)


def test_grey_png_leaves_other_files_to_others(tmp_path):
    grey = (np.arange(48 * 64) % 17).astype(np.uint8).reshape(48, 64)
    data = encode_grey_png(grey)
    path = tmp_path / "x.png"
    for picture in (Image.fromarray(grey).convert("P"), Image.fromarray(grey).convert("RGB")):
        picture.save(path)
        assert decode_grey_png(path.read_bytes(), max_pixels=10**6) is None
    assert decode_grey_png(b"", max_pixels=10) is None and decode_grey_png(b"\xff\xd8\xff", max_pixels=10) is None
    broken = 0
    for cut in range(len(data)):
        found = decode_grey_png(data[:cut], max_pixels=10**6)
        broken += found is None
        assert found is None or np.array_equal(found, grey), "a truncated file is whole or nothing"
    assert broken > len(data) - 16, "only the end mark may be missing"
    for place in range(len(data)):
        spoiled = bytearray(data)
        spoiled[place] ^= 0x55
        found = decode_grey_png(bytes(spoiled), max_pixels=10**6)
        assert found is None or np.array_equal(found, grey)
    huge = bytearray(data)
    huge[16:24] = b"\x00\x00\x20\x00\x00\x00\x20\x00"
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    assert decode_grey_png(bytes(huge), max_pixels=10**8) is None
