"""Adapters: the low-rank path by itself, layer by layer, and NumPy's gradients; what trains, what stays, what is kept."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests import tiny, tiny_methods
from tests.training.test_step import FROZEN, Toy, toy_batch
from truepose_jax.config import ConfigError, LoraConfig
from truepose_jax.inference.pipeline import Run
from truepose_jax.runtime.sharding import make_mesh, path_of
from truepose_jax.training import lora
from truepose_jax.training.checkpoint import Checkpoints, parameter_table, write_metadata
from truepose_jax.training.init import abstract_state, first_state
from truepose_jax.training.step import Trainer

FROM = {"init_from": "somewhere"}
TOY = r"^net/kernel$"


def toy(**optim) -> Trainer:
    adapters = {"rank": 2, "alpha": 6.0, "targets": TOY}
    return Trainer(tiny.config(FROM, {"optim": {"lora": adapters, "weight_decay": 0.0} | optim}), Toy(noise=0.0))


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_steps_by_hand(layout):
    """Adam on A and B with numpy's gradients, s dW B^T and s A^T dW, in float64; everything else keeps its bits."""
    made = toy(layout=layout, learning_rate=0.05, clip_norm=1e6, ema_decay=0.5)
    state = made.init_state(jax.random.key(7), {})
    first, step = jax.device_get(state), tiny.jit(made.step)
    bound = 1 / np.sqrt(4)
    pair = {name: np.asarray(x["kernel"], np.float64) for name, x in first.params["lora"]["net"].items()}
    assert not np.any(pair["lora_B"]) and 0.3 * bound < np.abs(pair["lora_A"]).max() <= bound
    whole = np.asarray(first.params["net"]["kernel"], np.float64)
    m, v = ({k: np.zeros(x.shape) for k, x in pair.items()} for _ in range(2))
    for count in range(1, 5):
        batch = toy_batch(count)
        x, errors = np.repeat(batch["source"], 2, axis=0).astype(np.float64), None
        errors = x @ (whole + 3.0 * pair["lora_A"] @ pair["lora_B"]) + first.params["net"]["bias"] + FROZEN["shift"]
        dw = 2 / (12 * 3) * x.T @ (errors - batch["target"])
        grads = {"lora_A": 3.0 * dw @ pair["lora_B"].T, "lora_B": 3.0 * pair["lora_A"].T @ dw}
        for k, g in grads.items():
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            pair[k] = pair[k] - 0.05 * (m[k] / (1 - 0.9**count)) / (np.sqrt(v[k] / (1 - 0.999**count)) + 1e-8)
        state, _ = step(state, FROZEN, batch)
        for k, want in pair.items():
            np.testing.assert_allclose(state.params["lora"]["net"][k]["kernel"], want, rtol=2e-4, atol=1e-6)
    moved = {
        path for path, x in tiny.named(state.params).items() if not np.array_equal(x, tiny.named(first.params)[path])
    }
    assert moved == {"lora/net/lora_A/kernel", "lora/net/lora_B/kernel"} == set(tiny.named(state.ema))


def low_rank_loss(method, params, pairs, scale, *inputs):
    """The method's loss with s (x A) B added to what each adapted layer says: no matrix is changed."""
    at = {id(leaf): path_of(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    met = set()

    def beside(call, args, kwargs, context):
        out = call(*args, **kwargs)
        module = context.module
        if not isinstance(module, nn.Dense) or context.method_name != "__call__":
            return out
        path = at.get(id(module.get_variable("params", "kernel")), "").removesuffix("/kernel")  # "": a frozen network
        if f"{path}/lora_A/kernel" not in pairs:
            return out
        met.add(path)
        return out + scale * (args[0] @ pairs[f"{path}/lora_A/kernel"]) @ pairs[f"{path}/lora_B/kernel"]

    with nn.intercept_methods(beside):
        loss, _ = method.loss(params, *inputs)
    assert 2 * len(met) == len(pairs), "not every adapted layer was met"
    return loss


def test_merged_is_the_low_rank_path():
    """Loss and gradients of every adapter, with all parameters random, B too; on attention's and HPFA's projections."""
    cfg, made, frozen, params = tiny_methods.one("truepose")
    config = LoraConfig(rank=2, alpha=6.0)
    assert {path.rsplit("/", 3)[1] for path in lora.targets_of(params, config)} >= {"attn1", "attn2", "hpfa"}
    born = lora.adapters(jax.random.key(0), params, config)
    same = lora.merged({**params, "lora": born}, config)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    pairs = jax.tree.map(lambda x: 0.5 * x, tiny.randomise(born, 3))
    inputs = (frozen, tiny_methods.batch(cfg, 1), tiny.keys(2, 4))
    ours = jax.value_and_grad(lambda pairs: made.loss(lora.merged({**params, "lora": pairs}, config), *inputs)[0])
    flat = lambda tree: {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}  # noqa: E731
    theirs = jax.value_and_grad(lambda pairs: low_rank_loss(made, params, flat(pairs), 3.0, *inputs))
    (loss, found), (want_loss, want) = tiny.jit(ours)(pairs), tiny.jit(theirs)(pairs)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    tiny.check_gradients(found, want, whole=1e-4, leaf=1e-3)


def save(workdir, made: Trainer, state) -> None:
    """As train.py leaves a run."""
    parts = {"params": state.params, "ema": state.ema, "rest": {"step": state.step}}
    checkpoints = Checkpoints(workdir, keep=1, every=1)
    checkpoints.save(int(state.step), parts, extra={"step": int(state.step)})
    checkpoints.close()
    write_metadata(workdir, config=made.config, parameter_table=parameter_table(state.params), mesh={})


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_is_its_sum_wherever_it_is_read(tmp_path, ema):
    """Its checkpoint holds the base once; what opens it, and what begins with it, has adapters added, of the EMA where it has
    one; further adapters begin anew upon that."""
    made = toy(learning_rate=0.05, ema_decay=ema)
    state = made.init_state(jax.random.key(7), {})
    for i in range(2):
        state, _ = tiny.jit(made.step)(state, FROZEN, toy_batch(i))
    state = jax.tree.map(jax.numpy.asarray, state)
    save(tmp_path / "run", made, state)
    assert (
        Checkpoints(tmp_path / "run", keep=1, every=1, read_only=True).restore_part("params").keys()
        == state.params.keys()
    )
    pair = (state.ema if ema else state.params)["lora"]["net"]
    want = state.params["net"]["kernel"] + 3.0 * pair["lora_A"]["kernel"] @ pair["lora_B"]["kernel"]
    run = Run.open(tmp_path / "run")
    assert run.params().keys() == {"net", "unused"} and run.unmerged().keys() == {"net", "unused", "lora"}
    np.testing.assert_allclose(run.params()["net"]["kernel"], want, rtol=1e-6)
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    for rank in (0, 1):
        optim = {"lora": {"rank": rank, "targets": TOY}}
        again = Trainer(tiny.config({"init_from": str(tmp_path / "run"), "optim": optim}), Toy())
        with jax.set_mesh(mesh):
            abstract = abstract_state(again.config, again, mesh)
            empty = Checkpoints(tmp_path / f"next{rank}", keep=1, every=1)
            begun = first_state(again.config, again, empty, abstract).params
            empty.close()
        np.testing.assert_allclose(begun["net"]["kernel"], want, rtol=1e-6)
        np.testing.assert_array_equal(begun["net"]["bias"], state.params["net"]["bias"])
        assert ("lora" in begun) == bool(rank)
        if rank:
            assert begun["lora"]["net"]["lora_A"]["kernel"].shape == (4, 1)
            assert not np.any(begun["lora"]["net"]["lora_B"]["kernel"])


REFUSED = {
    r"config\.optim\.lora\.rank is -1; it must be 0 or more": {"lora": {"rank": -1}},
    r"config\.optim\.lora\.alpha is 0\.0; it must be above 0": {"lora": {"rank": 1, "alpha": 0.0}},
    r"config\.optim\.lora\.targets '\(' is no regular expression": {"lora": {"rank": 1, "targets": "("}},
    r"optim\.trainable is '/hpfa/', and optim\.lora\.rank": {"lora": {"rank": 1}, "trainable": "/hpfa/"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words):
    with pytest.raises(ConfigError, match=words):
        tiny.config(FROM, {"optim": REFUSED[words]})


def test_refused_of_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.optim\.lora trains adapters of weights .* init_from"):
        tiny.config({"optim": {"lora": {"rank": 1}}})
    for targets, words in (("zzz", "'zzz' finds none of the parameters"), ("bias", "only matrices are adapted")):
        with pytest.raises(ConfigError, match=words):
            toy(lora={"rank": 1, "targets": targets}).init_state(jax.random.key(0), {})
