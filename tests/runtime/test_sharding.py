"""Meshes, logical axes and placement: rules in this process, numbers in one process with eight pretended devices."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests import tiny
from tests.process import environment, run
from tests.runtime.sharded import MESHES
from truepose_jax.runtime import sharding


@pytest.fixture(scope="module")
def sharded():
    code, out, errors = run("-m", "tests.runtime.sharded", env=environment(devices=8))
    assert code == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same(mesh, sharded):
    """Loss, gradients and SGD-updated parameters of TruePose with all parameters random, against one device."""
    found = sharded[mesh]
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-5 and found["leaf"] < 2e-5  # of all, and of the worst array (8e-6)
    assert found["moved"] < 1e-6
    assert found["constraints"] > 0, "no layout was pinned"


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_really_cut(mesh, sharded):
    found = sharded[mesh]
    assert found["shards_fit"] and found["moments_like_params"] and found["ema_like_params"]
    assert found["step_replicated"]
    # Per device, by the compiler's account, with 1 % of alignment: parameters, gradients, and all of the state (EMA, moments).
    share = {"fsdp": 1 / 8, "tensor": 1 / 2}[mesh]
    for what in ("params", "gradients", "state"):
        assert share * 0.95 < found["bytes"][what] < share * 1.02 + 0.01, what
    want = {"fsdp": (0.95, 0), "tensor": (0.95, 0.05)}[mesh]
    assert found["cut"]["fsdp"] >= want[0] and found["cut"]["tensor"] >= want[1]
    assert (found["cut"]["fsdp"] > 0, found["cut"]["tensor"] > 0) == (want[0] > 0, want[1] > 0)


def test_adapters_train_the_same_beside_a_matrix_that_is_cut(sharded):
    found = sharded["adapters"]
    assert found["apart"] < 1e-6 and found["cut"]["net/kernel"] == ["tensor", None]
    assert found["moments"] == {path: axes for path, axes in found["cut"].items() if path.startswith("lora/")} != {}


def test_the_noise_scale_by_shares_of_the_data_axis(sharded):
    """Per-device gradients under shard_map: the norms by hand, and the whole gradient as ever."""
    toy = sharded["noise"]["toy"]
    assert toy["gradient"] < 1e-5
    assert toy["small"] == pytest.approx(1, rel=1e-5) and toy["big"] == pytest.approx(1, rel=1e-5)
    assert toy["small_batch"] == pytest.approx(11 / 3)  # one of four shares holds nothing


def test_the_noise_scale_of_truepose_by_shares(sharded):
    """Its constraints hold inside the shard_map; fsdp and tensor stay as they are."""
    found = sharded["noise"]["truepose"]
    assert found["loss"] == pytest.approx(1, rel=1e-5)
    assert found["rms"] < 1e-5, "means over the kept samples of the whole batch"
    kept, summed = found["kept"]
    assert 0 < kept == summed < 8
    assert found["big"] == pytest.approx(1, rel=1e-5)
    assert found["above"] > 1  # parts are noisier than the whole


def test_the_noise_scale_sends_gradients_once(sharded):
    """All gradients (12 + 3 + 4 numbers) and metrics, float32, summed over the data axis; a few scalars beside."""
    assert 4 * 19 <= sharded["noise"]["toy"]["all_reduce"] <= 4 * (19 + 2 * 16 + 40)


def test_batches_are_cut_over_data_and_fsdp(sharded):
    found = sharded["batches"]
    assert found["parts"] == 4
    assert found["constrained"] == [2, 3, 2]
    for put in ("global", "whole"):
        assert found[put] == {"equal": True, "rows": [[0, 1], [2, 3], [4, 5], [6, 7]], "shape": [2, 4, 3]}


def shares(*holders):
    """The share of every process; holders: for each part of the batch, whose devices hold it."""
    devices = [(SimpleNamespace(process_index=p), (slice(i, i + 1),)) for i, row in enumerate(holders) for p in row]
    held = {id(device): (device, part) for device, part in devices}

    class Held(dict):
        def items(self):
            return held.values()

    return [sharding._share_of(Held(), process) for process in range(1 + max(p for row in holders for p in row))]


def test_who_loads_which_rows():
    """Processes of one tensor group load the same rows; each row of the batch is somebody's."""
    assert shares([0], [0], [1], [1]) == [(0, 2), (1, 2)]
    assert shares([0, 0], [1, 1]) == [(0, 2), (1, 2)]
    assert shares([0, 1]) == [(0, 1), (0, 1)]  # data 1, tensor 2 over two processes: both hold all rows
    assert shares([0, 1], [2, 3]) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    # data 16 over a v5e:4x4, whose ring goes in and out of hosts of 2x2 (jax.experimental.mesh_utils)
    ring = [0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]
    assert shares(*([p] for p in ring)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert sharding.batch_share(sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])) == (0, 1)
    for uneven in (([0, 0], [0, 1], [1, 1]), ([0], [0], [1])):
        with pytest.raises(ValueError, match=r"process 0 holds its parts \[0, 1\] and process 1 \[") as caught:
            shares(*uneven)
        assert "\n" not in str(caught.value)


def test_make_mesh():
    for sizes in ((-1, 1, 1), (1, -1, 1), (1, 1, 1)):
        mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)), devices=jax.devices()[:1])
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ((2, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 2, 1), (-2, 1, 1), (1, -1, 0), (-1, -3, -3)):
        with pytest.raises(ValueError, match="mesh sizes"):
            sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)), devices=jax.devices()[:1])


def test_constrain_refuses_what_it_does_not_know():
    x = np.zeros((2, 3))
    assert sharding.constrain(x, "batch", "tokens") is x
    with pytest.raises(KeyError, match="tokns"):
        sharding.constrain(x, "batch", "tokns")
    with pytest.raises(ValueError, match="dimensions"):
        sharding.constrain(x, "batch")
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])), pytest.raises(KeyError):
        jax.jit(lambda x: sharding.constrain(x, "batch", "tokns"))(x)


RULES = ((r"/to_q/kernel$", (None, "tensor")), (r"/to_out/kernel$", ("tensor", None)), (r"to_q", ("tensor", None)))
PLACED = {
    # path, shape -> axes on a (2, 4, 2) mesh
    ("a/to_q/kernel", (8, 16)): ("fsdp", "tensor"),
    ("a/to_q/kernel", (8, 15)): ("fsdp", None),  # tensor does not divide 15
    ("a/to_q/kernel", (6, 16)): (None, "tensor"),  # fsdp does not divide 6
    ("a/to_out/kernel", (16, 8)): ("tensor", "fsdp"),
    ("a/to_q/kernel", (3, 3, 8, 16)): (None, None, None, "fsdp"),  # rules name two dimensions
    ("a/conv/kernel", (3, 3, 16, 8)): (None, None, "fsdp", None),
    ("a/bias", (12,)): ("fsdp",),
    ("a/bias", (5,)): (None,),
    ("a/scalar", ()): (),
}


@pytest.mark.parametrize("path,shape", PLACED)
def test_param_specs(path, shape):
    found = sharding.param_specs(
        tree_of(path, shape) | USES_ALL_RULES, AbstractMesh((2, 4, 2), sharding.AXES), RULES, whole_below=0
    )
    (found,) = jax.tree.leaves(found["a"])
    assert tuple(found.spec) == PLACED[path, shape]


def tree_of(path, shape):
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return tree


SMALL_AND_LARGE = {"large": (256, 256), "small": (255, 256), "norm": (4096,)}
USES_ALL_RULES = {
    "b": tree_of("to_q/kernel", (2, 2)),
    "c": tree_of("to_out/kernel", (2, 2)),
    "d": tree_of("to_q/other", (2, 2)),
}


@pytest.mark.parametrize("rule", [(r"/to_k/kernel$", (None, "tensor")), (r"/to_q/kernel$", (None, None, "tensor"))])
def test_a_rule_that_places_nothing_is_an_error(rule):
    """Misspelt, or of another number of dimensions: the network would lie whole on every device, and nobody would say so."""
    with pytest.raises(ValueError, match=re.escape(f"{rule[0]!r} places no parameter of {len(rule[1])} dimensions")):
        sharding.param_specs(USES_ALL_RULES, AbstractMesh((2, 4, 2), sharding.AXES), (rule, *RULES))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_parameter_of_truepose_is_covered(sizes):
    """By a tensor rule or the default; what fsdp leaves whole is only what it divides nowhere."""
    _, made, params = tiny.base()
    mesh = AbstractMesh(sizes, sharding.AXES)
    specs = sharding.param_specs(params, mesh, made.param_rules, whole_below=0)
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        free = [n for n, axis in zip(leaf.shape, spec.spec, strict=True) if axis != "tensor"]
        divided = [n for n in free if n % mesh.shape["fsdp"] == 0]
        cut = [n for n, axis in zip(leaf.shape, spec.spec, strict=True) if axis == "fsdp"]
        assert cut == ([max(divided)] if divided and mesh.shape["fsdp"] > 1 else []), sharding.path_of(path)


def test_small_arrays_stay_whole():
    """256 x 256 is cut, 255 x 256 and every norm are not; what tensor cuts it cuts as before."""
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SMALL_AND_LARGE.items()}
    specs = sharding.param_specs(tree | USES_ALL_RULES, AbstractMesh((2, 4, 2), sharding.AXES), RULES)
    assert {name: tuple(specs[name].spec) for name in tree} == {
        "large": ("fsdp", None), "small": (None, None), "norm": (None,)
    }  # fmt: skip
    assert tuple(specs["b"]["to_q"]["kernel"].spec) == (None, "tensor")


def test_small_arrays_cost_no_messages(sharded):
    """Of eight layers with a norm each: all-gathers and bytes of a step, with and without small arrays cut."""
    cut, whole = sharded["messages"]
    assert cut["all-gather"]["count"] >= 16 and whole["all-gather"]["count"] <= cut["all-gather"]["count"] - 8
    assert whole["all-gather"]["wire_bytes"] < cut["all-gather"]["wire_bytes"]


def test_rules_of_truepose_name_what_exists():
    """Every rule places some parameter over `tensor`, in both networks; the pairs cut and join the same dimension."""
    _, made, params = tiny.base()
    specs = sharding.param_specs(params, AbstractMesh((1, 1, 2), sharding.AXES), made.param_rules)
    found = {sharding.path_of(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(specs)}
    block = "mid_block/attentions_0/transformer_blocks_0"
    for name in (f"{block}/attn1/to_q", f"{block}/attn2/to_k", f"{block}/ff/net_0/proj"):
        assert found[f"source_net/{name}/kernel"] == PartitionSpec(None, "tensor")
    for name in (f"{block}/attn1/to_out_0", f"{block}/ff/net_2", f"{block}/hpfa/to_out_0"):
        assert found[f"target_net/{name}/kernel"] == PartitionSpec("tensor", None)
    site = "fusion/mid_block_attentions_0_transformer_blocks_0"
    for name in ("hpfa/source_to_q", "hpfa/to_v", "attn2/to_k"):
        assert found[f"{site}/{name}/kernel"] == PartitionSpec(None, "tensor")
    for name, spec in found.items():
        assert ("tensor" in spec) == (
            name.endswith("kernel") and ("/to_" in name or "/net_" in name or "source_to" in name)
        )


def test_collective_matmuls_are_off_on_tpus_alone():
    """tests/benchmarks/test_tpu_train_step.py compiles with it (slow)."""
    described = SimpleNamespace(devices=np.array([[SimpleNamespace(platform="tpu")]]))
    ((name, threshold),) = sharding.compiler_options(described).items()
    assert "windowed_einsum" in name and threshold > 2**17  # MiB: more than any chip has
    assert sharding.compiler_options(sharding.make_mesh(data=1, fsdp=1, tensor=1)) is None
