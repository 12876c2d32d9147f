"""The one door to attention. Models call these two; which implementation answers is decided here.

`implementation` None takes what `default_implementation` names, else what suits the backend and the sizes, and says so in the log
once for every size (level INFO). An implementation that cannot take a call hands it to `xla`, and warns: never a crash. One that
`default_implementation` names for many calls hands those that it cannot take to what suits them, then to `xla`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import math
from collections.abc import Iterator
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

from truepose_jax.kernels.attention import reference
from truepose_jax.kernels.attention.key_params import key_params, plain_rows
from truepose_jax.kernels.attention.reference import PiecewiseLinear
from truepose_jax.runtime.sharding import LOGICAL_AXES

MASK_AXES = ("key", "query", "outer", "none")
READINGS = ("printed", "prose")
IMPLEMENTATIONS = ("reference", "xla", "per_image", "pallas_tpu", "pallas_gpu", "cudnn")
"""Modules of this folder. All but the first have attend(q, k, v, rows) with the rows of key_params.py and refuses(...), which
says what of a call they cannot take."""
FEW_KEYS = 4
"""Up to so many keys no named default is taken but what suits: SourceNet's attn2 meets one token and CAA two, of which a
blockwise kernel would make whole tiles."""
OF_ANY_WIDTHS = ("reference", "per_image")
"""Those that take values of another width than the keys'."""
UNVERIFIED = ("pallas_tpu", "pallas_gpu", "cudnn")
"""Never run on the hardware they are for: only by name, with a warning."""
RUNS_ON = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}
"""The one platform of those that do not run everywhere."""

LEAST_LOGITS, LEAST_LOGITS_ON_CPU = 1_000_000, 30_000
"""Queries x keys from which `reference` is left. On CPU its softmax passes over a whole batch's logits held the training step;
on GPU and TPU not measured: below it the logits of one image's eight heads take under 32 MB."""
MOST_LOGITS_PER_IMAGE = 1_500_000
"""Queries x keys up to which a CPU takes images one by one. Time with gradients on one core, `per_image` / `xla` /
`reference`: 768 tokens, 12 images, 1 head of 92: 140, 212, 246 ms; 704 tokens, 2 images, 8 heads of 40: 80, 88, 129; 2816
tokens: 2046, 1559, 2645; 192 tokens, 12 images, 1 head of 144: 14, 17, 18; of 48: 5, 5, 17. Forward alone: 33, 57, 50 ms at
768 tokens. Since `per_image` has a backward pass of its own it takes 0.65 to 0.81 of these, gradients included."""

_log = logging.getLogger(__name__)
_default: contextvars.ContextVar[str | None] = contextvars.ContextVar("default_implementation", default=None)


@contextlib.contextmanager
def default_implementation(name: str | None) -> Iterator[None]:
    """Within it, calls that name no implementation take this one. Read while tracing: a compiled function keeps its own."""
    _check(name)
    token = _default.set(name)
    try:
        yield
    finally:
        _default.reset(token)


def attention(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g e"],
    *,
    key_mask: Bool[Array, "b m"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n g e"]:
    """softmax(q k^T / sqrt d) v; keys with key_mask False are left out, a row without keys gives 0.

    Implementations that want one width are given zeros beside what is narrower."""
    d, e = q.shape[-1], v.shape[-1]
    width = max(d, e)
    of_one_width = [_widened(x, width) for x in (q * (width / d) ** 0.5, k, v)]
    name = _choose("attention", implementation, *of_one_width, key_mask is not None)
    if d != e and name not in OF_ANY_WIDTHS:
        rows = None if key_mask is None else plain_rows(key_mask, width)
        return _on_mesh(name, *of_one_width, rows)[..., :e]
    if name == "reference":
        return _pinned(reference.attention(*map(_pinned, (q, k, v)), key_mask=key_mask))
    return _on_mesh(name, q, k, v, None if key_mask is None else plain_rows(key_mask, q.shape[-1]))


def reweighted_attention(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    key_mask: Bool[Array, "b m"],
    *,
    delta: float = 0.6,
    sigma: float = 0.3,
    reading: str = "printed",
    mask_axis: str = "key",
    implementation: str | None = None,
) -> Float[Array, "b n g d"]:
    """HPFA's attention, Eq. 6 and 7 of TruePose. key_mask: True = inside M; no gradient reaches it.

    mask_axis (docs/paper.md A1): what M_ij indexes. "query" and "outer" want n == m (source self-attention) and always run on
    `reference`.
    """
    if mask_axis not in MASK_AXES:
        raise ValueError(f"mask_axis is {mask_axis!r}; choose one of {MASK_AXES}")
    if mask_axis == "none":
        return attention(q, k, v, implementation=implementation)
    inside, outside = reference.eq6_slopes(delta, sigma, reading)
    keys, queries = reference.mask_sides(mask_axis, key_mask)
    if queries is None:
        return sloped_attention(q, k, v, keys, inside=inside, outside=outside, implementation=implementation)
    _check(implementation)
    _say("reweighted_attention", tuple(q.shape[1:]), k.shape[1], str(q.dtype), "reference", f"mask_axis {mask_axis!r}")
    q, k, v = map(_pinned, (q, k, v))
    out = reference.reweighted_attention(q, k, v, keys, inside=inside, outside=outside, query_mask=queries)
    return _pinned(out)


def sloped_attention(
    q: Float[Array, "b n g d"],
    k: Float[Array, "b m g d"],
    v: Float[Array, "b m g d"],
    key_mask: Bool[Array, "b m"],
    *,
    inside: PiecewiseLinear,
    outside: PiecewiseLinear,
    implementation: str | None = None,
) -> Float[Array, "b n g d"]:
    """The general form: softmax(slope * a + kink * max(a, 0)) v, a = q k^T / sqrt d, slope and kink by the key's bit."""
    name = _choose("reweighted_attention", implementation, q, k, v, True)
    if name == "reference":
        q, k, v = map(_pinned, (q, k, v))
        return _pinned(reference.reweighted_attention(q, k, v, key_mask, inside=inside, outside=outside))
    return _on_mesh(name, q, k, v, key_params(key_mask, inside, outside, q.shape[-1]))


def platform() -> str:
    """What the program is for: the platform of the mesh in use (it may be a description of devices that are not here),
    else of jax.default_device, else of the default backend. Where arguments lie cannot be seen while tracing."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.default_backend()
    found = device if isinstance(device, str) else device.platform
    return "gpu" if found in ("cuda", "rocm") else found


def cannot_run(name: str) -> str | None:
    """Why the implementation of this name runs nowhere on this platform; None where it does."""
    wanted = RUNS_ON.get(name, platform())
    return (
        None if wanted == platform() else f"{name} runs on a {wanted.upper()} alone, and this is a {platform().upper()}"
    )


def _check(name: str | None) -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation is {name!r}; choose one of {IMPLEMENTATIONS}")


def _choose(operation: str, name: str | None, q: Array, k: Array, v: Array, has_rows: bool) -> str:
    """The implementation that takes this call."""
    _check(name)
    n, m = q.shape[1], k.shape[1]
    suited, why, refused = _suited(platform(), n, m), "asked for", False
    then = ["xla", "reference"]
    if name is None:
        name, then = _default.get() if m > FEW_KEYS else None, [suited, *then]
        if name is not None and (reason := cannot_run(name)):
            name, why, refused = suited, reason, True
    if name is None:
        name, why = suited, f"suits {n} x {m} on {platform()}"
    parts = tuple(map(_part, (q, k, v)))
    while name != "reference" and (reason := _kernel(name).refuses(*parts, has_rows=has_rows, platform=platform())):
        then = [each for each in then if each != name]
        name, why, refused = then[0], f"{name} does not take {reason}", True
    _say(operation, tuple(q.shape[1:]), m, str(q.dtype), name, why, warn=refused or name in UNVERIFIED)
    return name


def _part(x: Array) -> jax.ShapeDtypeStruct:
    """What a kernel sees of [b n g d] on one device of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    b, n, g, d = x.shape
    images, heads = (math.prod(mesh.shape[axis] for axis in axes) for axes in _axes(mesh, x))
    return jax.ShapeDtypeStruct((b // images, n, g // heads, d), x.dtype)


def _kernel(name: str) -> ModuleType:
    """Imported when first used: Pallas takes 1.5 s to import."""
    return importlib.import_module(f"{__package__}.{name}")


def _suited(backend: str, n: int, m: int) -> str:
    if n * m < (LEAST_LOGITS_ON_CPU if backend == "cpu" else LEAST_LOGITS):
        return "reference"
    return "per_image" if backend == "cpu" and n * m <= MOST_LOGITS_PER_IMAGE else "xla"


@functools.cache
def _say(
    operation: str, shape: tuple[int, int, int], keys: int, dtype: str, name: str, why: str, warn: bool = False
) -> None:
    n, g, d = shape
    note = "; UNVERIFIED on the hardware it is for" if name in UNVERIFIED else ""
    text = f"{operation} of {n} queries, {keys} keys, {g} heads of {d}, {dtype}: {name} ({why}){note}"
    _log.log(logging.WARNING if warn else logging.INFO, text)


def _on_mesh(name: str, q: Array, k: Array, v: Array, rows: Array | None) -> Array:
    """The kernel on every device's own part of the batch and the heads; on one device, just the kernel.

    Where some axes of the mesh are manual already, the others become so too, were they of one device: Mosaic takes no kernel
    that XLA might still have to cut.
    """
    attend = functools.partial(_kernel(name).attend, **_interpreted(name))
    mesh = jax.sharding.get_abstract_mesh()
    free = _free(mesh)
    if not free or (mesh.size == 1 and not mesh.manual_axes):
        return attend(q, k, v, rows)
    of_array = _cut(mesh, q)
    specs = (of_array,) * 3 + (() if rows is None else (PartitionSpec(of_array[0], None, None),))
    # check_vma: Pallas calls do not say along which axes their outputs vary
    call = jax.shard_map(
        lambda q, k, v, rows=None: attend(q, k, v, rows),
        in_specs=specs,
        out_specs=of_array,
        axis_names=free,
        check_vma=False,
    )
    return call(q, k, v) if rows is None else call(q, k, v, rows)


def _widened(x: Float[Array, "b n g d"], width: int) -> Float[Array, "b n g width"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


def _pinned(x: Array) -> Array:
    """`reference` lies on the mesh as the kernels do. Left alone, XLA let FSDP's cut of CAA's projections through to the
    activations and gathered those of all images on every chip: 4.2 GB sent per chip and step instead of 0.5 (v5e:4x4, two
    levels, 64 images a chip; compiled, not run)."""
    mesh = jax.sharding.get_abstract_mesh()
    if not any(mesh.shape[axis] > 1 for axis in _free(mesh)):
        return x
    return jax.lax.with_sharding_constraint(x, _cut(mesh, x))


def _free(mesh: AbstractMesh) -> set[str]:
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}


def _cut(mesh: AbstractMesh, x: Array) -> PartitionSpec:
    """How [b n g d] is cut."""
    images, heads = _axes(mesh, x)
    return PartitionSpec(images or None, None, heads or None, None)


def _axes(mesh: AbstractMesh, x: Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that cut the images and the heads. One that does not divide them is left out: its devices repeat the work."""

    def dividing(logical: str, size: int) -> tuple[str, ...]:
        taken, parts = [], 1
        for axis in LOGICAL_AXES[logical]:
            if axis in _free(mesh) and size % (parts * mesh.shape[axis]) == 0:
                taken.append(axis)
                parts *= mesh.shape[axis]
        return tuple(taken)

    return dividing("batch", x.shape[0]), dividing("heads", x.shape[2])


def _interpreted(name: str) -> dict[str, bool]:
    """Pallas kernels asked for by name where their hardware is not are interpreted: slow, for tests."""
    return {"interpret": platform() != name.removeprefix("pallas_")} if name.startswith("pallas_") else {}
