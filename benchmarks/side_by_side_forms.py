"""One form of one side in a process of its own: it builds, says that it is ready, and then does what stdin tells it.

    python -m benchmarks.side_by_side_forms FOLDER FORM        (started by side_by_side.py)

FOLDER/case.json is the Case. Commands and answers are lines: `check` -> numbers in FOLDER/FORM.npy and {"seconds",
"resident_bytes"}, `time` -> {"seconds", "cpu_seconds"}, `facts` -> {"peak_bytes", ...}. It ends with stdin. So every form has
its own memory, threads and compiler, and a form that dies takes no other with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.side_by_side_case import CHECKED_STEPS, LEARNING_RATE, WEIGHT_DECAY, Case

OURS = "ours"
PEERS = {
    "train": ("eager", "eager_nhwc", "compiled", "compiled_nhwc", "eager_flex", "compiled_flex", "compiled_nhwc_flex"),
    "sample": (
        "recompute_eager", "recompute_eager_nhwc", "recompute_compiled", "recompute_compiled_nhwc",
        "cached_eager", "cached_eager_nhwc", "cached_compiled", "cached_compiled_nhwc",
        "recompute_compiled_nhwc_flex", "cached_compiled_nhwc_flex", "cached_compiled_nhwc_graphs",
    ),
}  # fmt: skip
"""Names are made of: whether sampling recomputes the source's side; eager or torch.compile; nhwc: PyTorch's channels_last
layout; flex: Eq. 6 by FlexAttention; graphs: the denoiser as CUDA graphs (torch.compile's "reduce-overhead"), GPUs only."""
GRAPHS = "graphs"
PREPARE = "prepare"
PROGRAMS = "BENCHMARK_PROGRAMS"
"""Environment variable: the folder of side_by_side.py's --programs."""


@dataclasses.dataclass
class Form:
    """check: what both sides must agree on. call: one timed step or batch of pictures, results awaited. peak: bytes."""

    check: Callable[[], np.ndarray]
    call: Callable[[], Any]
    peak: Callable[[], int | None]
    facts: dict[str, Any]
    device: str = ""


# --- ours ------------------------------------------------------------------------------------------------------------


def our_form(case: Case) -> Form:
    import jax

    from benchmarks import side_by_side_case as cases
    from truepose_jax.kernels.attention.api import default_implementation

    with default_implementation(case.attention or None):
        form = {"train": _our_training, "sample": _our_sampling}[case.task](case, jax, cases)
    return dataclasses.replace(form, device=jax.devices()[0].device_kind)


def _compiled(case: Case, function, *arguments, **options) -> tuple[Any, dict[str, Any]]:
    """The program, and seconds of tracing and compiling with what it holds of memory. One that gpu_aot.py compiled beforehand is
    loaded where it fits."""
    import jax

    from benchmarks.gpu_aot import load

    start = traced = time.perf_counter()
    folder = os.environ.get(PROGRAMS)
    program = load(pathlib.Path(folder) / f"{case.name}.program", function, arguments) if folder else None
    loaded = program is not None
    if not loaded:
        lowered = jax.jit(function, **options).lower(*arguments)
        traced = time.perf_counter()
        program = lowered.compile()
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    facts = {
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
        "program_bytes": used - memory.alias_size_in_bytes,
        "loaded": loaded,
    }
    return program, facts


def _our_peak(facts: dict[str, Any]) -> int | None:
    """JAX's count of a device cannot be set back after loading, so there it is what the program holds."""
    import jax

    return facts["program_bytes"] if jax.local_devices()[0].memory_stats() else _peak_resident()


def _our_training(case: Case, jax, cases) -> Form:
    from truepose_jax.training.step import Trainer

    trainer = Trainer(case.config(), cases.method_of(case))
    batch = jax.device_put(cases.batch_of(case))
    holder = [jax.jit(trainer.state_of)(cases.params_of(case))]
    step, facts = _compiled(case, trainer.step, holder[0], {}, batch, donate_argnums=0)

    def one() -> jax.Array:
        holder[0], metrics = step(holder[0], {}, batch)
        return metrics["loss"]

    return Form(
        check=lambda: np.array([float(one()) for _ in range(CHECKED_STEPS)]),
        call=lambda: jax.block_until_ready((one(), holder[0])),
        peak=lambda: _our_peak(facts),
        facts=facts,
    )


def _our_sampling(case: Case, jax, cases) -> Form:
    from truepose_jax.sampling.sampler import Sampler, Sampling, cast_kernels, compiler_options

    config = case.config()
    diffusion = config.diffusion
    sampling = Sampling(case.steps, case.guidance)
    sampler = Sampler(cases.method_of(case), diffusion.schedule, diffusion.spacing, sampling)
    # In float32 cast_kernels gives back what it got: without device_put every call would copy the host's arrays.
    params = jax.device_put(cast_kernels(cases.params_of(case), case.dtype))
    inputs = params, {}, jax.device_put(cases.batch_of(case))
    inputs = (*inputs, cases.sampling_keys(case))
    program, facts = _compiled(case, sampler.sample, *inputs, compiler_options=compiler_options())
    return Form(
        check=lambda: np.asarray(program(*inputs)),
        call=lambda: jax.block_until_ready(program(*inputs)),
        peak=lambda: _our_peak(facts),
        facts=facts,
    )


# --- the peer --------------------------------------------------------------------------------------------------------


def peer_form(case: Case, form: str, folder: pathlib.Path) -> Form:
    import torch

    from truepose_jax.interop import torch_truepose

    torch.set_num_threads(case.threads)
    ways = form.split("_")
    if "flex" in ways:
        torch_truepose.reweighted_attention = functools.partial(_flex_attention, torch)
    device = {"cpu": "cpu", "gpu": "cuda"}[case.device]
    _as_ours(torch, case)
    # Training keeps float32 weights and computes by autocast, sampling holds the weights as it computes, as ours does.
    held = torch.bfloat16 if case.dtype == "bfloat16" and case.task == "sample" else torch.float32
    model = torch_truepose.TruePose.from_pretrained(folder / "export", torch_dtype=held).to(device)
    given = {name: torch.from_numpy(x).to(device) for name, x in np.load(folder / "inputs.npz").items()}

    layout = torch.channels_last if "nhwc" in ways else torch.contiguous_format
    model = model.to(memory_format=layout)
    if case.remat:
        _recompute_blocks(torch, model)

    def nchw(x):
        moved = x.movedim(-1, -3)
        return moved.contiguous(memory_format=layout) if moved.ndim == 4 else moved.contiguous()

    inputs = torch_truepose.Inputs(
        source=nchw(given["source"]),
        parsing=given["source_parsing"],
        tokens=given["region_tokens"],
        present=given["region_valid"],
        class_on=given["class_on"],
        pose=nchw(given["target_pose"]),
    )
    given |= {name: nchw(given[name]) for name in ("target", "eps", "noise") if name in given}
    make = {"train": _peer_training, "sample": _peer_sampling}[case.task]
    return make(torch, case, ways, model, inputs, given)


def _as_ours(torch, case: Case) -> None:
    """float32 without TF32, as environment_of asks of ours; on GPUs convolutions are tried out, as XLA does by itself."""
    if case.dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if case.device == "gpu":
        torch.backends.cudnn.benchmark = True


def _recompute_blocks(torch, model) -> None:
    """What case.remat is for ours: every resnet and transformer block is computed anew in the backward pass."""
    from diffusers.models.resnet import ResnetBlock2D
    from torch.utils.checkpoint import checkpoint

    from truepose_jax.interop.torch_truepose import SourceBlock, TargetBlock

    for module in model.modules():
        if isinstance(module, ResnetBlock2D | SourceBlock | TargetBlock):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _peer_peak(torch, case: Case) -> int | None:
    return torch.cuda.max_memory_allocated() if case.device == "gpu" else _peak_resident()


def _await(torch, case: Case) -> None:
    if case.device == "gpu":
        torch.cuda.synchronize()


def _peer_training(torch, case: Case, ways, model, inputs, given) -> Form:
    decayed, plain = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    loss_of = torch.compile(model.loss) if "compiled" in ways else model.loss
    valid = given["valid"]
    device = given["target"].device.type

    def one(step: int = 0):
        optimizer.zero_grad(set_to_none=True)
        drawn = given["eps"][step], given["t"][step].long()
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = loss_of(given["target"], *drawn, inputs, given["keep"][step].float(), valid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _await(torch, case)
        return loss.detach()

    return Form(
        check=lambda: np.array([one(step).item() for step in range(CHECKED_STEPS)]),
        call=one,
        peak=lambda: _peer_peak(torch, case),
        facts={},
    )


def _peer_sampling(torch, case: Case, ways, model, inputs, given) -> Form:
    if GRAPHS in ways:
        replayed = torch.compile(model.denoise, mode="reduce-overhead")
        # The next call writes over a graph's result, and guidance needs both branches' at once.
        model.denoise = lambda *arguments: replayed(*arguments).clone()
    elif "compiled" in ways:
        model.denoise = torch.compile(model.denoise)
        if "recompute" in ways:
            model.source_side = torch.compile(model.source_side)
    mode = "recompute" if "recompute" in ways else "cached"

    @torch.inference_mode()
    def sample():
        found = model.sample(inputs, given["noise"], steps=case.steps, guidance=case.guidance, source=mode)
        _await(torch, case)
        return found

    return Form(
        check=lambda: sample().movedim(1, -1).float().cpu().numpy(),
        call=sample,
        peak=lambda: _peer_peak(torch, case),
        facts={},
    )


def _flex_attention(torch, q, k, v, mask, settings):
    """torch_truepose.reweighted_attention by FlexAttention, mask_axis "key"; [b g n d]."""
    from torch.nn.attention.flex_attention import flex_attention

    if settings["mask_axis"] != "key":
        raise ValueError(f"FlexAttention is written for mask_axis 'key'; the export has {settings['mask_axis']!r}")
    delta, sigma = settings["delta"], settings["sigma"]
    rising_out, falling_out = (sigma, 1 + sigma) if settings["reading"] == "printed" else (1 + sigma, sigma)

    def score(logit, b, g, i, j):
        del g, i
        inside = mask[b, j]
        return logit * torch.where(
            logit > 0, torch.where(inside, 1 + delta, rising_out), torch.where(inside, delta, falling_out)
        )

    return _compiled_flex(torch, flex_attention)(q, k, v, score_mod=score)


@functools.cache
def _compiled_flex(torch, flex_attention):
    return torch.compile(flex_attention)  # uncompiled it is a reference that holds all logits


# --- the process -----------------------------------------------------------------------------------------------------


def _resident(name: str) -> int | None:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since _forget_peak. None where the system does not tell."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _peak_resident() -> int | None:
    return _resident("VmHWM") if _begins_anew else None


_begins_anew = False
"""Whether VmHWM is of the calls alone."""


def _forget_peak(device: str) -> int | None:
    """What building and compiling left behind goes back to the system as far as it does, and the peak begins anew. Returns
    the bytes that the process then holds on the host; None for a GPU's forms, whose memory is the device's."""
    global _begins_anew
    if device == "gpu":
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return None
    with contextlib.suppress(AttributeError):  # a libc without it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # gVisor has no such file: the peak is then unknown
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        _begins_anew = True
    return _resident("VmRSS")


def product_rate(size: int = 2048) -> float:
    """FLOPs a second of a float32 product of NumPy with this process's cores and threads: the best of five."""
    x = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def serve(form: Form, folder: pathlib.Path, name: str, device: str, answer) -> None:
    for line in sys.stdin:
        command = line.strip()
        start = time.perf_counter()
        if command == "check":
            np.save(folder / f"{name}.npy", form.check())
            seconds = time.perf_counter() - start
            answer({"seconds": seconds, "resident_bytes": _forget_peak(device)})
        elif command == "time":
            cpu = time.process_time()
            form.call()
            answer({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu})
        elif command == "facts":
            answer({"peak_bytes": form.peak(), **form.facts})


def main(argv: list[str]) -> None:
    folder, name = pathlib.Path(argv[1]), argv[2]
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=channel, flush=True)

    case = Case.of(json.loads((folder / "case.json").read_text()))
    if name == PREPARE:
        from benchmarks.side_by_side_case import write_for_peer

        write_for_peer(case, folder)
        answer({"product_flops": product_rate()} if case.device == "cpu" else {})
        return
    form = our_form(case) if name == OURS else peer_form(case, name, folder)
    answer({"device": form.device})
    serve(form, folder, name, case.device, answer)


if __name__ == "__main__":
    main(sys.argv)
