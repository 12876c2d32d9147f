"""The order is a function of (seed, step) alone; flips, groups, broken records, and the batch schema."""

import itertools
import pickle

import numpy as np
import pytest

from input_pipeline.annotations.parsing import LABEL_SETS, class_on, flip_parsing
from input_pipeline.annotations.skeleton import draw_skeleton_uint8
from input_pipeline.batches.loader import RecordCache, TokenTable, eval_batches, make_loader
from input_pipeline.batches.plans import GroupPlan
from input_pipeline.batches.transforms import flip_record
from input_pipeline.schema import InputError
from tests.records import pair_layout
from tests.shared_data import NoiseImages

WIDTH = 8
LAYOUT = pair_layout(width=WIDTH)


def tokens_of(count: int) -> TokenTable:
    rng = np.random.default_rng(5)
    make = lambda: rng.standard_normal((count, 21, WIDTH)).astype(np.float32)  # noqa: E731
    return TokenTable.packed(make(), rng.random((count, 21)) < 0.5, make(), rng.random((count, 21)) < 0.5)


@pytest.fixture(scope="module")
def images():
    return NoiseImages()


@pytest.fixture(scope="module")
def tokens(images):
    return tokens_of(len(images))


def take(count: int, loader) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(loader, count))


def assert_same(a: list, b: list) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for name in LAYOUT.fields:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def index_of(images: NoiseImages, picture: np.ndarray) -> tuple[int, bool]:
    """(index, flipped) of a picture in [-1, 1]."""
    pixels = np.round((picture + 1) * 127.5).astype(np.uint8)
    for flipped in (False, True):
        hit = (images.images == (pixels[:, ::-1] if flipped else pixels)).all((1, 2, 3))
        if hit.any():
            return int(hit.argmax()), flipped
    raise AssertionError("not one of the set's pictures")


SETTINGS = {"seed": 3, "batch_size": 8, "flip": True, "self_pair": 0.2}


@pytest.mark.parametrize("k", [1, 4])
def test_resume_equals_straight_and_threads_do_not_matter(images, tokens, k):
    settings = SETTINGS | {"targets_per_source": k}
    straight = take(30, make_loader(images, tokens, LAYOUT, threads=2, **settings))
    assert_same(straight[22:], take(8, make_loader(images, tokens, LAYOUT, start_step=22, threads=0, **settings)))
    assert_same(straight[:3], take(3, make_loader(RecordCache(images, max_bytes=10**6), tokens, LAYOUT, **settings)))
    other = take(3, make_loader(images, tokens, LAYOUT, **settings | {"seed": 4}))
    assert not np.array_equal(other[0]["source"], straight[0]["source"])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_get_contiguous_rows_of_one_global_batch(images, tokens, hosts):
    settings = SETTINGS | {"targets_per_source": 2, "start_step": 5}
    whole = take(6, make_loader(images, tokens, LAYOUT, **settings))
    parts = [
        take(6, make_loader(images, tokens, LAYOUT, host_index=h, host_count=hosts, **settings)) for h in range(hosts)
    ]
    joined = [{name: np.concatenate([p[step][name] for p in parts]) for name in LAYOUT.fields} for step in range(6)]
    assert_same(whole, joined)


def test_batches_follow_the_schema(images, tokens):
    for k in (1, 2, 8):
        batch = next(make_loader(images, tokens, LAYOUT, seed=0, batch_size=8, targets_per_source=k))
        assert LAYOUT.check(batch) == {"s": 8 // k, "b": 8, "h": 64, "w": 48, "e": WIDTH, "j": 18}
        assert batch["source"].min() == -1 and batch["source"].max() == 1
        assert batch["target_pose"].min() == 0 and batch["target_pose"].max() == 1
        assert batch["valid"].all()


def test_bytes_with_maps_are_the_floats_and_fit_the_schema(images, tokens):
    """Of a set that is no set of records: pictures rounded to bytes, everything else as it is."""
    settings = {"seed": 1, "batch_size": 8, "targets_per_source": 2, "flip": True}
    loaders = (make_loader(images, tokens, pair_layout(form), **settings) for form in ("float32", "uint8"))
    for floats, compact in zip(*(take(2, loader) for loader in loaders), strict=True):
        pair_layout("uint8").check(compact)
        assert floats.keys() == compact.keys() and compact["target_parsing"].any()
        for name, wanted in floats.items():
            if name in ("source", "target"):
                wanted = np.rint((wanted + 1) * 127.5)
            elif name == "target_pose":
                wanted = np.rint(wanted * 255)
            np.testing.assert_array_equal(compact[name], wanted, err_msg=name)


def test_rows_hold_what_they_say(images, tokens):
    labels = LABEL_SETS["atr18"]
    for batch in take(3, make_loader(images, tokens, LAYOUT, seed=1, batch_size=8, targets_per_source=2, flip=True)):
        for row in range(8):
            source, flipped = index_of(images, batch["source"][row // 2])
            target, target_flipped = index_of(images, batch["target"][row])
            assert flipped == target_flipped and source != target and source // 4 == target // 4
            expected, valid = tokens.of(source, flip=flipped)
            np.testing.assert_array_equal(batch["region_tokens"][row // 2], expected)
            np.testing.assert_array_equal(batch["region_valid"][row // 2], valid)
            record = images.image(target)
            record = flip_record(record, labels) if flipped else record
            np.testing.assert_array_equal(batch["target_joints"][row], record.joints)
            np.testing.assert_array_equal(batch["target_parsing"][row], record.parsing)
            np.testing.assert_array_equal(batch["class_on"][row], class_on(record.joints, labels, hw=(64, 48)))
            pose = draw_skeleton_uint8(record.joints, joints_hw=(64, 48), out_hw=(64, 48))
            np.testing.assert_array_equal(batch["target_pose"][row], pose / np.float32(255))
            map_ = images.maps[source]
            np.testing.assert_array_equal(
                batch["source_parsing"][row // 2], flip_parsing(map_, labels) if flipped else map_
            )


def test_an_epoch_is_every_pair_once_and_reshuffled(images, tokens):
    steps = len(images.pairs) // 8
    loader = make_loader(images, tokens, LAYOUT, seed=0, batch_size=8)
    epochs = []
    for _ in range(2):
        rows = [
            (index_of(images, b["source"][i])[0], index_of(images, b["target"][i])[0])
            for b in take(steps, loader)
            for i in range(8)
        ]
        assert sorted(rows) == sorted(map(tuple, images.pairs.tolist()))
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    ordered = next(make_loader(images, tokens, LAYOUT, seed=0, batch_size=8, shuffle=False))
    found = [index_of(images, picture)[0] for picture in ordered["target"]]
    assert found == images.pairs[:8, 1].tolist()


def test_targets_of_a_source_do_not_repeat_while_there_are_enough(images):
    plan = GroupPlan(images.pairs, seed=0, targets_per_source=3, flip=False, self_pair=0.0)
    seen = set()
    for epoch in range(6):
        group = plan.draw(17, epoch)
        assert group.source == images.pairs[17, 0] and group.targets[0] == images.pairs[17, 1]
        assert len(set(group.targets)) == 3 and group.source not in group.targets
        seen.add(group.targets)
    assert len(seen) > 1, "epochs draw anew"
    many = GroupPlan(images.pairs, seed=0, targets_per_source=7, flip=False, self_pair=0.0).draw(0, 0)
    counts = np.unique(many.targets, return_counts=True)[1]
    assert len(counts) == 3 and counts.max() - counts.min() == 1


def test_self_pairs_and_flips_come_at_their_rates(images):
    plan = GroupPlan(images.pairs, seed=0, targets_per_source=2, flip=True, self_pair=0.25)
    groups = [plan.draw(i % len(images.pairs), i // len(images.pairs)) for i in range(2000)]
    own = np.mean([t == g.source for g in groups for t in g.targets])
    assert abs(own - 0.25) < 0.03 and abs(np.mean([g.flip for g in groups]) - 0.5) < 0.04
    everything = GroupPlan(images.pairs, 0, 2, False, self_pair=1.0).draw(0, 0)
    assert set(everything.targets) == {everything.source}


class Broken(NoiseImages):
    """Photo 1 cannot be read."""

    def image(self, index):
        if index == 1:
            raise InputError("photo 1 is truncated")
        return super().image(index)


def test_a_broken_record_keeps_its_slot(images, tokens, caplog):
    broken = Broken()
    settings = {"seed": 0, "batch_size": 8, "targets_per_source": 2}
    good = take(18, make_loader(images, tokens, LAYOUT, **settings))
    bad = take(18, make_loader(broken, tokens, LAYOUT, **settings))
    hit = 0
    for a, b in zip(good, bad, strict=True):
        for row in range(8):
            touched = 1 in (index_of(images, a["source"][row // 2])[0], index_of(images, a["target"][row])[0])
            assert b["valid"][row] == (0 if touched else 1)
            hit += touched
            if touched:
                assert not b["target"][row].any() and not b["target_pose"][row].any() and not b["class_on"][row].any()
            else:
                np.testing.assert_array_equal(a["target"][row], b["target"][row])
        LAYOUT.check(b)
    assert hit > 0
    assert [r.getMessage() for r in caplog.records] == ["photo 1 is truncated (its rows weigh nothing)"]


def test_eval_batches_are_ordered_and_padded(images, tokens):
    pairs = images.pairs[:11]
    batches = list(eval_batches(images, tokens, LAYOUT, pairs, 4))
    assert len(batches) == 3
    for batch in batches:
        assert LAYOUT.check(batch)["b"] == 4
    np.testing.assert_array_equal(np.concatenate([b["valid"] for b in batches]), [1] * 11 + [0])
    found = [index_of(images, b["target"][i])[0] for b in batches for i in range(4) if b["valid"][i]]
    assert found == pairs[:, 1].tolist()
    assert not batches[-1]["source"][3].any()


def test_record_cache_reads_once_and_stays_within_its_room():
    calls = []

    class Counting(NoiseImages):
        def image(self, index):
            calls.append(index)
            return super().image(index)

    images = Counting()
    size = images.image(0).image.nbytes + images.maps[0].nbytes + images.joints[0].nbytes
    calls.clear()
    cache = RecordCache(images, max_bytes=2 * size)
    for _ in range(2):
        for index in range(3):
            np.testing.assert_array_equal(cache.image(index).image, images.images[index])
    assert calls == [0, 1, 2, 2] and len(cache) == len(images)


def test_a_full_record_cache_goes_to_loader_processes_empty(images):
    cache = RecordCache(images, max_bytes=10**9)
    empty = len(pickle.dumps(cache))
    for index in range(len(images)):
        cache.image(index)
    told = pickle.dumps(cache)
    assert len(told) == empty
    np.testing.assert_array_equal(pickle.loads(told).image(1).image, cache.image(1).image)


def test_errors_in_one_line(images, tokens):
    cases = {
        "not a multiple": {"batch_size": 6, "targets_per_source": 4},
        "2 hosts": {"batch_size": 3, "host_count": 2},
        "flipped_rows": {"flip": True, "tokens": TokenTable(tokens.rows, tokens.valid)},
        "token table": {"tokens": tokens_of(3)},
    }
    for words, changes in cases.items():
        with pytest.raises(InputError, match=words) as excinfo:
            make_loader(**{"images": images, "tokens": tokens, "layout": LAYOUT, "seed": 0, "batch_size": 8} | changes)
        assert "\n" not in str(excinfo.value)
    with pytest.raises(InputError, match="no pairs"):
        next(eval_batches(images, tokens, LAYOUT, np.zeros((0, 2)), 4))
    for wrong in (99, -1):
        with pytest.raises(InputError, match=f"name image {wrong}, but the set has 24, numbered from 0"):
            next(eval_batches(images, tokens, LAYOUT, np.array([[0, wrong]]), 4))


def test_flip_record_twice_is_the_record(images):
    labels = LABEL_SETS["atr18"]
    record = images.image(2)
    twice = flip_record(flip_record(record, labels), labels)
    np.testing.assert_array_equal(twice.image, record.image)
    np.testing.assert_array_equal(twice.parsing, record.parsing)
    np.testing.assert_allclose(twice.joints, record.joints, rtol=1e-6)
