"""Every implementation of attention against float64 (tests/kernels/oracle64.py): values and all gradients."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tests.kernels import oracle64
from tests.kernels.oracle64 import Case
from tests.process import environment, run
from truepose_jax.kernels.attention import api, cudnn, pallas_gpu, pallas_tpu, xla
from truepose_jax.kernels.attention.reference import PiecewiseLinear
from truepose_jax.runtime.sharding import AXES

SIDES = (PiecewiseLinear(0.6, 1.0), PiecewiseLinear(1.3, -1.0))
"""Eq. 6 with delta 0.6 and sigma 0.3: inside 1.6 a or 0.6 a, outside 0.3 a or 1.3 a."""
PLAIN = (PiecewiseLinear(1.0, 0.0), PiecewiseLinear(1.0, 0.0))


def case(seed, n, m, *, b=2, g=2, d=8, mask="random", size=1.0, dtype=np.float32) -> Case:
    """Float64 arrays that `dtype` holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(length, scale):
        return np.asarray(jnp.asarray(scale * rng.standard_normal((b, length, g, d)), dtype)).astype(np.float64)

    bits = {
        "random": rng.random((b, m)) < 0.4,
        "all": np.ones((b, m), bool),
        "none": np.zeros((b, m), bool),
        "one": np.arange(m)[None] == rng.integers(0, m, (b, 1)),
    }[mask]
    return Case(draw(n, size), draw(m, size), draw(m, 1.0), bits, np.ones((b, m), bool), draw(n, 1.0))


def call(attend, arrays: Case, dtype=jnp.float32):
    """Output and the gradients by q, k and v, in one compiled function. attend(q, k, v, bits)."""

    @jax.jit
    def run(q, k, v, bits, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, bits), q, k, v)
        return out, *pull(d_out)

    q, k, v, d_out = (jnp.asarray(x, dtype) for x in (arrays.q, arrays.k, arrays.v, arrays.d_out))
    return run, (q, k, v, arrays.mask, d_out)


def worst(found, want) -> float:
    """Largest error of output and gradients, each over its largest entry (where that is under 0.1: over 0.1); NaN for NaN."""
    errors = [
        np.max(np.abs(np.asarray(f, np.float64) - w)) / max(np.max(np.abs(w)), 0.1)
        for f, w in zip(found, want, strict=True)
    ]
    return float(np.max(errors))


class Attention:
    """What every implementation must do. Subclasses name one, and shrink its blocks so that small arrays make several."""

    name: str
    dtype = jnp.float32
    close, close_if_large = 2e-5, 5e-4  # float32 logits of 500 are good to 3e-5, and so are their exponentials
    vmaps = True

    @pytest.fixture(autouse=True)
    def small_blocks(self):
        """So that small arrays take several; nothing to do where there are none, or tiles are 64 x 64."""

    def reweighted(self, q, k, v, bits):
        return api.reweighted_attention(q, k, v, bits, implementation=self.name)

    def plain(self, q, k, v, bits):
        return api.attention(q, k, v, key_mask=bits, implementation=self.name)

    def everything(self, q, k, v, bits):
        del bits
        return api.attention(q, k, v, implementation=self.name)

    def case(self, seed, n, m, **changes):
        return case(seed, n, m, dtype=self.dtype, **changes)

    def call(self, attend, arrays):
        return call(attend, arrays, self.dtype)

    @pytest.mark.parametrize("n,m,d", [(19, 37, 8), (37, 19, 5)])
    def test_reweighted(self, n, m, d):
        """Odd lengths, n != m, in several blocks; every kind of mask through one compiled function."""
        run, _ = self.call(self.reweighted, self.case(0, n, m, d=d))

        def error(arrays):
            return worst(run(*self.call(self.reweighted, arrays)[1]), oracle64.answer(arrays, *SIDES))

        for mask in ("random", "all", "none", "one"):
            assert error(self.case(n, n, m, d=d, mask=mask)) < self.close, mask
        flat = self.case(2, n, m, d=d)
        assert error(flat._replace(q=0 * flat.q)) < self.close  # every logit sits on the kink
        large = self.case(1, n, m, d=d, size=12.0)
        assert np.max(np.abs(np.einsum("bngd,bmgd->bgnm", large.q, large.k))) > 500
        assert error(large) < self.close_if_large

    def test_prose_reading_and_other_numbers(self):
        def attend(q, k, v, bits):
            return api.reweighted_attention(
                q, k, v, bits, delta=0.1, sigma=0.9, reading="prose", implementation=self.name
            )

        arrays = self.case(3, 19, 37)
        run, inputs = self.call(attend, arrays)
        assert worst(run(*inputs), oracle64.answer(arrays, (0.1, 1.0), (0.9, 1.0))) < self.close

    def test_plain(self):
        """Without a mask; with one; and rows without a key, which give 0 and move nothing."""
        arrays = self.case(4, 19, 37)
        run, inputs = self.call(self.everything, arrays)
        assert worst(run(*inputs), oracle64.answer(arrays, *PLAIN)) < self.close
        run, _ = self.call(self.plain, arrays)
        for mask in ("random", "one", "none", "all"):
            arrays = self.case(5, 19, 37, mask=mask)
            arrays.mask[0] &= mask != "one"  # the first image has no key at all
            found = run(*self.call(self.plain, arrays)[1])
            want = oracle64.answer(arrays._replace(keep=arrays.mask), *PLAIN)
            assert worst(found, want) < self.close, mask
            if mask == "none":
                assert not any(np.any(x) for x in found)

    def test_values_of_another_width(self):
        """Narrower and wider than the keys, with absent keys."""
        for width in (5, 13):
            arrays, other = self.case(9, 19, 37), self.case(10, 19, 37, d=width)
            arrays = arrays._replace(v=other.v, d_out=other.d_out)
            run, inputs = self.call(self.plain, arrays)
            assert worst(run(*inputs), oracle64.answer(arrays._replace(keep=arrays.mask), *PLAIN)) < self.close

    def test_one_key_and_one_query(self):
        arrays = self.case(6, 1, 1, b=1, g=1, d=4)
        run, inputs = self.call(self.reweighted, arrays)
        assert worst(run(*inputs), oracle64.answer(arrays, *SIDES)) < self.close

    def test_bfloat16(self):
        """Of inputs that are bfloat16 exactly, the error is that of rounding weights and results to 8 bits."""
        arrays = case(7, 19, 37, dtype=jnp.bfloat16)
        run, inputs = call(self.reweighted, arrays, jnp.bfloat16)
        found = run(*inputs)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        assert worst(found, oracle64.answer(arrays, *SIDES)) < 2e-2

    def test_vmap_and_no_jit(self):
        arrays = self.case(8, 19, 37)
        run, (q, k, v, bits, d_out) = self.call(self.reweighted, arrays)
        want = [np.asarray(x, np.float64) for x in run(q, k, v, bits, d_out)]
        if self.vmaps:
            found = jax.vmap(lambda *x: run(*(y[None] for y in x)))(q, k, v, bits, d_out)
            assert worst([x[:, 0] for x in found], want) < self.close
        assert worst([self.reweighted(q, k, v, bits)], want[:1]) < self.close


class TestReference(Attention):
    name = "reference"


class TestXla(Attention):
    name = "xla"

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(xla, "BLOCK_QUERIES", 8)
        monkeypatch.setattr(xla, "BLOCK_KEYS", 16)

    def test_no_array_of_logits_is_kept(self):
        """Forward and backward of 512 x 512 allocate less than the logits would take."""
        n = 512
        run, inputs = self.call(self.reweighted, self.case(0, n, n, b=1, g=4, d=8))
        memory = run.lower(*inputs).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * n * n * 4


class TestPerImage(Attention):
    name = "per_image"

    def test_logits_of_one_image_and_head_at_a_time(self):
        """Forward and backward of 256 x 256 allocate less than two of eight such arrays would take."""
        n = 256
        run, inputs = self.call(self.reweighted, self.case(0, n, n, b=2, g=4, d=8))
        memory = run.lower(*inputs).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 6 * n * n * 4


class TestPallasTpu(Attention):
    """In interpret mode. tests/kernels/test_tpu_aot.py compiles it."""

    name = "pallas_tpu"

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(pallas_tpu, "SUBLANES", 8)
        monkeypatch.setattr(pallas_tpu, "LANES", 8)  # so that two heads of 8 make two groups
        monkeypatch.setattr(pallas_tpu, "MOST_QUERIES", 16)
        monkeypatch.setattr(pallas_tpu, "MOST_KEYS", 32)  # of float32: 16


class PallasGpu(Attention):
    """In JAX's interpreter of Mosaic GPU, which is slow and cannot be mapped; no GPU was at hand."""

    name = "pallas_gpu"
    dtype = jnp.float16
    close, close_if_large = 5e-3, 2e-2
    vmaps = False


@pytest.mark.slow
class TestPallasGpu(PallasGpu):
    pass


def test_pallas_gpu_in_several_tiles():
    arrays = case(9, 70, 100, b=1, g=1, dtype=jnp.bfloat16)
    run, inputs = call(PallasGpu().reweighted, arrays, jnp.bfloat16)
    assert worst(run(*inputs), oracle64.answer(arrays, *SIDES)) < 2e-2


def test_pallas_gpu_lowers_for_a_gpu():
    """Down to Mosaic's own program, with all register layouts settled, for each padded head width; no GPU is needed."""
    for d in (40, 80, 160):
        q = jax.ShapeDtypeStruct((1, 100, 2, d), jnp.bfloat16)
        rows = jax.ShapeDtypeStruct((1, 3, 100), jnp.float32)

        def run(q, k, v, rows, d_out):
            return jax.vjp(lambda q, k, v: pallas_gpu.attend(q, k, v, rows), q, k, v)[1](d_out)

        lowered = jax.jit(run).trace(q, q, q, rows, q).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 3


# --- the door --------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    """What the door says, from nothing."""
    api._say.cache_clear()
    caplog.set_level(logging.INFO, logger=api.__name__)
    return caplog


def arrays_of(n, m=None, *, d=4, dtype=jnp.float32):
    q, k = (np.zeros((1, length, 2, d), dtype) for length in (n, m or n))
    return q, k, k


def attended(*arrays, **settings):
    """Shape and dtype of what the door gives, which chooses while it is traced."""
    return jax.eval_shape(functools.partial(api.attention, **settings), *arrays)


def chosen(said, platform, n, m=None, **changes):
    """The implementation that the door says it takes, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "platform", lambda: platform)
        said.clear()
        return api._choose("attention", None, *arrays_of(n, m, **changes), True)


def test_choice_by_backend_and_size(said):
    sizes = (12, 48, 176, 704, 2816)
    assert [chosen(said, "cpu", n) for n in sizes] == ["reference"] * 2 + ["per_image"] * 2 + ["xla"]
    for platform in ("tpu", "gpu"):
        assert [chosen(said, platform, n) for n in sizes] == ["reference"] * 4 + ["xla"]
        assert chosen(said, platform, 2816, 2) == "reference"  # region tokens
        assert not {chosen(said, platform, n) for n in range(1, 5000, 99)} & set(api.UNVERIFIED)
    with api.default_implementation("pallas_tpu"):
        assert [chosen(said, "tpu", n) for n in sizes] == ["pallas_tpu"] * 5
        assert "UNVERIFIED on the hardware it is for" in said.text and said.records[-1].levelname == "WARNING"
        assert chosen(said, "tpu", 256, d=512) == "reference"
        assert chosen(said, "tpu", 2816, dtype=jnp.float16) == "xla"
        assert "pallas_tpu does not take dtypes float16" in said.text


def test_only_what_was_refused_or_never_verified_is_a_warning(said):
    attended(*arrays_of(5))
    attended(*arrays_of(5, d=300), implementation="pallas_tpu")
    assert [record.levelname for record in said.records] == ["INFO", "WARNING"]


def test_default_device_counts_as_the_platform():
    with jax.default_device("tpu"):
        assert api.platform() == "tpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert api.platform() == "cpu"


def test_without_any_key_there_is_nothing():
    q, k, v = arrays_of(5)
    out = api.attention(q, k[:, :0], v[:, :0], key_mask=jnp.zeros((1, 0), bool), implementation="xla")
    assert out.shape == q.shape and not np.any(out)


def test_choice_is_said_once(said):
    for _ in range(3):
        attended(*arrays_of(5))
    assert len(said.records) == 1
    assert "attention of 5 queries, 5 keys, 2 heads of 4, float32: reference (suits 5 x 5 on cpu)" in said.text
    attended(*arrays_of(6))
    assert len(said.records) == 2


def test_what_a_kernel_cannot_take_goes_elsewhere(said):
    q, k, v = arrays_of(5, d=300)
    assert attended(q, k, v, implementation="pallas_tpu").shape == q.shape
    assert "xla (pallas_tpu does not take heads of width 300" in said.text
    assert attended(q, k, v, implementation="pallas_gpu").shape == q.shape
    assert "xla (pallas_gpu does not take dtypes float32" in said.text
    assert attended(q, k, v, implementation="cudnn").shape == q.shape
    assert "xla (cudnn does not take a program for cpu" in said.text
    empty = np.zeros((1, 0, 2, 300))
    assert attended(empty, k, v, implementation="xla").shape == (1, 0, 2, 300)
    mixed = attended(q.astype(jnp.bfloat16), k, v, implementation="xla")
    assert mixed.dtype == jnp.bfloat16


def test_blocks_of_the_tpu_kernels_fit_into_vmem(said):
    """SD1.5's levels keep their long blocks; wide float32 heads get shorter ones, and what fits in none goes to xla."""

    def block(n, g, d, dtype):
        found = pallas_tpu.sizes(2, n, n, g, d, dtype, has_rows=True)
        assert pallas_tpu.vmem_bytes(found) <= pallas_tpu.MOST_VMEM
        return found.block_m

    assert [block(n, 8, d, "bfloat16") for n, d in ((2816, 40), (704, 80), (176, 160))] == [352, 352, 176]
    assert block(2816, 8, 40, "float32") == 256 and block(2048, 8, 120, "float32") == 128
    q, k, v = arrays_of(256, d=29)
    q, k, v = (np.repeat(x, 16, axis=2) for x in (q, k, v))
    assert attended(q, k, v, implementation="pallas_tpu").shape == q.shape
    assert "xla (pallas_tpu does not take 32 heads of width 29, which need 19.1 MiB of VMEM" in said.text


def test_cudnn_takes_what_the_card_can(monkeypatch):
    """Heads up to 128, from Hopper on up to 256; nothing on ROCm, whose capability is no number."""
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays_of(5, d=160))

    def refusal(capability):
        monkeypatch.setattr(cudnn, "compute_capability", lambda: capability)
        return cudnn.refuses(q, k, v, has_rows=False, platform="gpu")

    assert refusal("9.0") is None and "up to 128" in refusal("8.0") and "gfx942" in refusal("gfx942")


def test_what_the_default_cannot_take_goes_to_what_suits(said):
    """One kernel for a whole model: its refusal alone sends no small attention to `xla`."""
    with api.default_implementation("cudnn"):
        assert chosen(said, "gpu", 48) == "reference"
        assert "reference (cudnn does not take masks" in said.text
        assert chosen(said, "gpu", 2816) == "xla"
        assert chosen(said, "tpu", 2816) == "xla"
        assert "xla (cudnn runs on a GPU alone, and this is a TPU)" in said.text
    with api.default_implementation("pallas_tpu"):
        assert chosen(said, "tpu", 2816, dtype=jnp.float16) == "xla"


def test_default_implementation(said):
    with api.default_implementation("xla"):
        attended(*arrays_of(5))
        assert "xla (asked for)" in said.text
        with api.default_implementation(None):
            attended(*arrays_of(7))
        attended(*arrays_of(48, 2))
    assert "reference (suits 7 x 7 on cpu)" in said.text
    assert "48 queries, 2 keys" in said.text and "reference (suits 48 x 2 on cpu)" in said.text


def test_unknown_names():
    q, k, v = arrays_of(3)
    bits = np.ones((1, 3), bool)
    for axis in api.MASK_AXES:
        with pytest.raises(ValueError, match="implementation is 'flash'; choose one of"):
            api.reweighted_attention(q, k, v, bits, mask_axis=axis, implementation="flash")
    with pytest.raises(ValueError, match="implementation is 'flash'"), api.default_implementation("flash"):
        pass
    with pytest.raises(ValueError, match="mask_axis is 'rows'"):
        api.reweighted_attention(q, k, v, bits, mask_axis="rows")


@pytest.mark.parametrize("axis", ["query", "outer", "none"])
def test_other_mask_axes_agree_with_reference(axis):
    """They run on reference (none: on the plain attention that was asked for)."""
    arrays = case(0, 9, 9)
    run = [
        call(functools.partial(api.reweighted_attention, mask_axis=axis, implementation=name), arrays)
        for name in ("xla", "reference")
    ]
    (found, inputs), (want, _) = run
    assert worst(found(*inputs), [np.asarray(x, np.float64) for x in want(*inputs)]) < 2e-5


# --- on a mesh -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded():
    code, out, errors = run("-m", "tests.kernels.sharded_attention", env=environment(devices=8))
    assert code == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


def test_eight_devices_give_the_same(sharded):
    assert len(sharded["errors"]) == 10
    for what, error in sharded["errors"].items():
        assert error < 2e-5, what


def test_kernels_lower_for_tpus_where_the_data_axis_is_manual(sharded):
    """As the noise scale takes gradients. Mosaic refuses a kernel under any axis that is not."""
    assert sharded["mosaic_calls"] == {"data": 3, "all": 3}


def test_every_device_works_on_its_own_part(sharded):
    """Over data 2, fsdp 2, tensor 2; images x heads as named. 3 of either cannot be cut, 2 images over data only."""
    assert sharded["parts"] == {"4x4": [1, 37, 2, 8], "3x4": [3, 37, 2, 8], "2x3": [1, 37, 3, 8]}
    assert sharded["kernel_sees"] == [1, 19, 2, 8]


@pytest.mark.parametrize(
    ("images", "heads", "spec"),
    [(8, 4, (("data", "fsdp"), None, ("tensor",))), (2, 3, (("data",), None, None)), (3, 4, (None, None, ("tensor",)))],
)
def test_reference_lies_on_a_mesh_as_the_kernels_do(images, heads, spec):
    """Queries, keys, values and output each: left alone, FSDP's cut of the projections reached the activations."""
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    q, k = (jax.ShapeDtypeStruct((images, length, heads, 8), jnp.float32) for length in (37, 2))
    mask = jax.ShapeDtypeStruct((images, 2), bool)
    sloped = functools.partial(api.sloped_attention, inside=SIDES[0], outside=SIDES[1])
    for attend in (lambda q, k, mask: api.attention(q, k, k, key_mask=mask), lambda q, k, mask: sloped(q, k, k, mask)):
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = jax.make_jaxpr(attend)(q, k, mask)
        pins = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]
        assert [pin.invars[0].aval.shape[1] for pin in pins] == [37, 2, 2, 37]
        assert all(pin.params["sharding"].spec == PartitionSpec(*spec, None) for pin in pins)
    assert not [eqn for eqn in jax.make_jaxpr(attend)(q, k, mask).eqns if eqn.primitive.name == "sharding_constraint"]
