"""What a run begins with: a converted folder, another run, or neither; and one line for what does not fit."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import tiny
from tests.tiny_run import STEPS, random_like, shared_run, tiny_config
from truepose_jax.config import Config, ConfigError, to_dict
from truepose_jax.methods import make_method
from truepose_jax.models.vae import PixelAutoencoder
from truepose_jax.pretrained.conversion.key_maps import leaves, nest
from truepose_jax.pretrained.conversion.safetensors_io import TensorInfo, write_safetensors
from truepose_jax.pretrained.conversion.weights_folder import FORMAT, VERSION
from truepose_jax.pretrained.factory import planned
from truepose_jax.runtime.sharding import make_mesh
from truepose_jax.training.checkpoint import Checkpoints
from truepose_jax.training.init import HPFA_OUT, abstract_state, batch_spec, first_state, resolve_init_from
from truepose_jax.training.step import Trainer


@functools.cache
def trainer_of(config: Config) -> Trainer:
    return Trainer(config, make_method(config, PixelAutoencoder(config.model.pixel_factor)))


def write_folder(folder: pathlib.Path, arrays: dict[str, np.ndarray], config: Config, **changes) -> pathlib.Path:
    """A weights folder of these parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {path: TensorInfo(a.shape, a.dtype) for path, a in arrays.items()}
    write_safetensors(folder / "params.safetensors", infos, arrays.items())
    details = {
        "format": FORMAT,
        "version": VERSION,
        "method": "truepose",
        "unet": to_dict(config.model.unet),
        "fresh": ["pose_encoder"],
        "schedule": None,
        "origin": {"name": "a test"},
    }
    (folder / "weights.json").write_text(json.dumps(details | changes))
    return folder


def begin(config: Config, workdir: pathlib.Path):
    """(state, its abstract form)."""
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    trainer = trainer_of(config)
    checkpoints = Checkpoints(workdir, keep=1, every=1)
    with jax.set_mesh(mesh):
        abstract = abstract_state(config, trainer, mesh)
        state = first_state(resolve_init_from(config), trainer, checkpoints, abstract)
    checkpoints.close()
    return state, abstract


@pytest.fixture(scope="module")
def given():
    """Parameters of the tiny network without its pose encoder; every third tensor in bf16, every fifth in fp16."""
    trainer = trainer_of(tiny_config())
    shapes = jax.eval_shape(lambda: trainer.method.init(jax.random.key(0), tiny.spec(trainer.config)))
    arrays = {p: np.asarray(a) for p, a in leaves(random_like(shapes, 5)) if not p.startswith("pose_encoder/")}
    narrow = {0: ml_dtypes.bfloat16, 1: np.float16}
    return {p: a.astype(narrow.get(i % 5, np.float32)) for i, (p, a) in enumerate(arrays.items())}


def test_converted_weights(tmp_path, given):
    folder = write_folder(tmp_path / "weights", given, tiny_config())
    config = tiny_config(init_from=str(folder))
    state, abstract = begin(config, tmp_path / "run")
    for (path, leaf), shape in zip(leaves(state.params), jax.tree.leaves(abstract.params), strict=True):
        assert leaf.dtype == np.float32 and leaf.sharding == shape.sharding
        if path in given:
            assert np.array_equal(leaf, given[path].astype(np.float32)), path
    # What the folder lacks begins as it does in a run from nothing.
    init = tiny.jit(lambda key: trainer_of(config).method.init(key, tiny.spec(config))["pose_encoder"])
    jax.tree.map(np.testing.assert_allclose, state.params["pose_encoder"], init(jax.random.key(config.seed)))
    assert state.step == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert not any(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True
    ))  # fmt: skip


def test_an_ablation_takes_what_it_has_use_for(tmp_path, given, capsys):
    """B4 of the full method's weights: HPFA's are left out, and that is said; a tensor that it wants is still missed."""
    folder = write_folder(tmp_path / "weights", given, tiny_config())
    b4 = {"model__fusion__texture": "concat"}
    state, _ = begin(tiny_config(init_from=str(folder), **b4), tmp_path / "run")
    for path, leaf in leaves(state.params):
        assert "/hpfa/" not in path
        if not path.startswith("pose_encoder/"):
            assert np.array_equal(leaf, given[path].astype(np.float32)), path
    left_out = sum("/hpfa/" in path for path in given)
    assert f"no use for them: {left_out} tensors" in capsys.readouterr().out
    less = write_folder(tmp_path / "less", {p: a for p, a in given.items() if "conv_in" not in p}, tiny_config())
    with pytest.raises(ConfigError, match="lacks source_net/conv_in"):
        begin(tiny_config(init_from=str(less), **b4), tmp_path / "other")


def test_carried_latents_leave_a_plain_unets_start_untouched(tmp_path, given):
    """HPFA's update is exactly 0 at birth, so the network predicts what it does without carrying, as two programs round."""
    zeros = {p: np.zeros_like(a) if "/hpfa/to_out_0/" in p else a for p, a in given.items()}
    folder = write_folder(tmp_path / "weights", zeros, tiny_config())
    flow = {f"model__fusion__{name}": True for name in ("carry_latents", "cosine", "residual")}
    config = tiny_config(init_from=str(folder), diffusion__losses__flow=0.3, **flow)
    flat = dict(leaves(begin(config, tmp_path / "flow")[0].params))
    wider = {path for path, array in zeros.items() if array.shape != flat[path].shape}
    assert wider == {path for path in zeros if path.endswith(HPFA_OUT)}
    for path in wider:
        assert flat[path].shape == (8 + 2 * 48, 8) and not np.any(flat[path])
    fresh = {path for path in flat.keys() - zeros.keys() if not path.startswith("pose_encoder/")}
    assert fresh and all(path.endswith("/cosine_scale") and np.allclose(flat[path], np.log(10.0)) for path in fresh)
    assert all(np.array_equal(flat[path], zeros[path].astype(np.float32)) for path in zeros.keys() - wider)

    paper = {path: array[:8] if path in wider else array for path, array in flat.items() if path not in fresh}
    batch = tiny.batch(config, 1, targets=2)

    def predict(config, params):
        method = trainer_of(config).method
        conditioning = method.condition(params, {}, batch)
        x = jnp.ones((2, *method.latent_spec(config.model.size)))
        output, signs, _ = method._target(params, x, jnp.array([3, 700]), conditioning)
        return output, [each["hpfa_rms"] for each in signs.values()]

    carrying, updates = tiny.jit(lambda params: predict(config, params))(nest(flat))
    plain, _ = tiny.jit(lambda params: predict(tiny_config(), params))(nest(paper))
    assert not np.any(updates) and np.std(plain) > 0.1
    np.testing.assert_allclose(carrying, plain, atol=1e-6)


def test_another_run(tmp_path):
    """Its EMA weights; with its raw ones where it keeps no EMA. A run that has a checkpoint of its own takes that."""
    config = tiny_config(init_from=str(shared_run()))
    state, _ = begin(config, tmp_path / "run")
    expected = random_like(state.params, 10 * STEPS[-1])
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)


CHANGED_UNET = to_dict(tiny_config().model.unet) | {"block_out_channels": [16]}


def test_tensors_that_do_not_fit(tmp_path, given):
    folder, bias = tmp_path / "weights", "source_net/conv_in/bias"
    without = {path: array for path, array in given.items() if path != "target_net/conv_in/kernel"}
    for arrays, text in (
        (without, "lacks target_net/conv_in/kernel"),
        (given | {"source_net/more/kernel": np.zeros(2, np.float32)}, "holds source_net/more/kernel, which"),
        (given | {bias: np.zeros(2, np.float32)}, r"shape \[2\]; expected \[8\]"),
        (given | {bias: np.zeros(8, np.float64)}, "does not hold exactly"),
    ):
        write_folder(folder, arrays, tiny_config())
        with pytest.raises(ConfigError, match=text) as caught:
            begin(tiny_config(init_from=str(folder)), tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_folders_that_do_not_serve(tmp_path, given, caplog):
    wrong = write_folder(tmp_path / "wrong", given, tiny_config(), unet=CHANGED_UNET)
    damaged = write_folder(tmp_path / "damaged", given, tiny_config())
    (damaged / "weights.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run_without_metadata" / "checkpoints").mkdir(parents=True)
    for folder, text in {
        wrong: r"block_out_channels \(16,\)",
        damaged: "weights.json",
        tmp_path / "empty": "neither a folder that",
        tmp_path / "absent": "neither a folder that",
        tmp_path / "run_without_metadata": "holds no training run",
    }.items():
        with pytest.raises(ConfigError, match=text) as caught:
            resolve_init_from(tiny_config(init_from=str(folder)))
        assert "config.init_from" in str(caught.value)


def test_another_schedule_is_said_aloud(tmp_path, given, caplog):
    schedule = {"betas": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "steps": 1000, "prediction": "eps"}
    folder = write_folder(tmp_path / "weights", given, tiny_config(), schedule=schedule)
    resolve_init_from(tiny_config(init_from=str(folder)))
    assert "linear" in caplog.text and "scaled_linear" in caplog.text


SETTINGS = {
    "autoencoder": {"kind": "pixels", "factor": 4},
    "positions": "none",
    "source_parsing": "none",
    "fusion": {"regions": 2, "delta": 0.6, "sigma": 0.3, "reading": "printed", "mask_axis": "key"},
}
"""Those of tiny_config, as an export's truepose.json has them."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": "sincos"}, "model.positions sincos; give --config.model.positions=sincos"),
        ({"source_parsing": "coverage"}, "--config.model.source_parsing=coverage"),
        ({"fusion": {"reading": "prose"}}, "--config.model.fusion.reading=prose"),
        ({"fusion": {"mask_axis": "none"}}, "--config.model.fusion.mask_axis=none"),
        ({"fusion": {"delta": 0.5, "sigma": 0.2}}, "--config.model.fusion.delta=0.5 --config.model.fusion.sigma=0.2"),
        ({"fusion": {"carry_latents": True}}, "--config.model.fusion.carry_latents=True"),
        ({"fusion": {"cosine": True}}, "--config.model.fusion.cosine=True"),
        ({"autoencoder": {"kind": "sd15", "factor": 8}}, "--config.model.autoencoder=sd15"),
    ],
)
def test_an_export_of_another_network_is_refused_by_name(tmp_path, change, words):
    told = SETTINGS | {k: SETTINGS[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    folder = write_folder(tmp_path / "weights", {}, tiny_config(), settings=told)
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        resolve_init_from(tiny_config(init_from=str(folder)))
    assert "\n" not in str(error.value) and "was trained with" in str(error.value)


def test_another_number_of_regions_is_said_aloud(tmp_path, caplog):
    same = write_folder(tmp_path / "same", {}, tiny_config(), settings=SETTINGS)
    resolve_init_from(tiny_config(init_from=str(same)))
    assert not caplog.text
    resolve_init_from(tiny_config(init_from=str(same), model__fusion__regions=3))
    assert "model.fusion.regions 2; this run has 3" in caplog.text
    resolve_init_from(tiny_config(init_from=str(shared_run()), model__positions="sincos"))
    assert "model.positions none; this run has sincos" in caplog.text, "of another run too"


def test_frozen_networks_come_along(tmp_path, given):
    """Where the folder holds CLIP and the config names none, it is the folder's; a named one stays."""
    folder = write_folder(tmp_path / "weights", given, tiny_config())
    for inside in ("vae", "image_encoder"):
        (folder / inside).mkdir()
        (folder / inside / "config.json").write_text("{}")
    found = resolve_init_from(tiny_config(init_from=str(folder)))
    assert found.model.clip.path == str(folder) and found.model.vae == ""  # a pixel codec has no VAE
    named = resolve_init_from(tiny_config(init_from=str(folder), model__clip__path="other"))
    assert named.model.clip.path == "other"


def test_no_parameter_is_weakly_typed():
    """The step's results never are, so it would compile twice."""
    config = tiny.config(tiny.HEAD)
    trainer, spec = Trainer(config, planned(config)[0]), batch_spec(config)
    state = jax.eval_shape(lambda: trainer.init_state(jax.random.key(0), spec))
    weak = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state) if getattr(leaf, "weak_type", False)]
    assert not weak
