"""The whole train step on TPUs: the largest batch per chip that fits, from programs compiled for them without one.

    python benchmarks/tpu_train_step.py --setup=FOLDER [--rows=REGEX] [--compilations=N] [--verify] [--list]

--setup makes a virtual environment with jax[tpu] in FOLDER (once), which finds all else in this one, and runs there; without
it this Python must have it. Each row of ROWS is a configuration as it stands in configs/ (photos through the VAE inside the
step, AdamW, EMA, bfloat16), cut by FSDP. Rows are written to benchmarks/results/tpu_train_step.json and .md as they end;
every compilation is kept under --work with the options, versions and sources that it is of, so that the same command goes on
where it was stopped; one that is of others is set aside with a notice.

A compilation is one process. The compiler assigns every buffer before it generates code; its buffer assignment (xla_dump_to)
is the account that memory_analysis would give, and a program that does not fit is refused there ("RESOURCE_EXHAUSTED ... HBM").
What comes after takes as long again and changes no memory, so the process is ended there, unless --code is given. Only shapes
are used. The optimisation effort is the least (of execution time): a full compilation may need a little less memory.

Of a row: `first` is compiled at the batch that training/memory.py predicts or a little below, a second one where the line through
the first and the estimate's bytes per image meets the chip's memory, and so on: the largest batch is the largest one
that was compiled and fits; with --verify one more is compiled and must be refused. Nothing was run or timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks a cloud's metadata server which machine this is
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing here holds a TPU that another process could want

import tpu_aot  # noqa: E402
from tpu_train_step_report import GIB, report  # noqa: E402

from benchmarks import tables  # noqa: E402
from truepose_jax.runtime.cli import Parser, program  # noqa: E402

OPTIONS = {"exec_time_optimization_effort": -1.0}
CONFIGS = {"256x176": "truepose_deepfashion_256", "512x352": "truepose_deepfashion_512"}
METHODS = {"fpdm": "fpdm_deepfashion_512", "imagpose": "imagpose_deepfashion_512"}
NETWORKS = {
    "two-level": {
        "block_out_channels": (320, 640),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (8, 8),
        "layers_per_block": 1,
    }
}
"""Changes of the UNets that compile in two minutes instead of ten."""
SOURCES = (
    "configs/*.py",
    "input_pipeline/schema.py",
    "truepose_jax/scaling/compiled.py",
    *(f"truepose_jax/{room}/**/*.py" for room in ("config", "models", "kernels", "methods", "diffusion")),
    *(f"truepose_jax/training/{name}.py" for name in ("init", "optim", "step")),
    *(f"truepose_jax/pretrained/{name}.py" for name in ("factory", "frozen_networks", "region_tokens")),
    *(f"truepose_jax/{name}.py" for name in ("data/annotations", "runtime/rng", "runtime/sharding")),
)
"""What a compiled step is made from."""
COMPILATIONS = 4
"""Most of a row where --compilations does not say."""
STRAIGHT = 4
"""Compilations of a row after which its bytes are taken as no straight line."""
POLL = 2.0
"""Seconds between looks at what the compiler has written."""

KEPT = (
    "bytes", "argument_bytes", "output_bytes", "donated_bytes", "temporary_bytes", "collectives", "wire_bytes", "kernels",
)  # fmt: skip
"""What a row says of its largest batch."""

FUSED = "pallas_tpu"
"""The attention of rows that name none."""


@dataclasses.dataclass(frozen=True)
class Row:
    """topology as jax.experimental.topologies takes it. fsdp: chips that the state is cut over; the rest is data-parallel.
    attention: an implementation of kernels/attention, "" for FUSED. network: "", a key of NETWORKS, "flow", the
    configuration's variant, or another method, a key of METHODS."""

    topology: str
    fsdp: int
    size: str
    remat: bool
    attention: str = ""
    network: str = ""

    @property
    def name(self) -> str:
        place = self.topology.replace(":", "-")
        parts = [
            place,
            f"fsdp{self.fsdp}",
            self.size,
            f"remat-{'on' if self.remat else 'off'}",
            self.attention,
            self.network,
        ]
        return "-".join(part for part in parts if part)

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.topology.partition(":")[2].split("x"))

    @property
    def available(self) -> int:
        """Bytes that a program may have on one chip."""
        from truepose_jax.scaling.hardware import Topology

        return Topology(self.topology).chip.memory


PLACES = (("v5e:4x4", 16), ("v6e:4x4", 16), ("v5p:2x2x2", 8))
ROWS = [Row(place, fsdp, size, remat) for size in CONFIGS for remat in (True, False) for place, fsdp in PLACES]
ROWS += [
    Row("v5e:16x16", 16, "256x176", True),
    Row("v5p:4x4x4", 8, "256x176", True),
    Row("v6e:8x8", 16, "256x176", True),
    Row("v5e:4x4", 16, "256x176", True, "reference"),
    Row("v5e:4x4", 16, "256x176", True, network="two-level"),
    Row("v5e:4x4", 16, "256x176", True, network="flow"),
    Row("v5e:4x4", 16, "512x352", True, network="fpdm"),
    Row("v5e:4x4", 16, "512x512", True, network="imagpose"),
]


def set_up(folder: pathlib.Path) -> pathlib.Path:
    """The Python of an environment with jax[tpu] before the packages of this one; made where it is not there yet.

    Raises SystemExit(tpu_aot.NO_PIP) where pip fails.
    """
    python = tpu_aot.set_up(folder)
    theirs = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(folder.resolve())}))
    (theirs / "of_the_project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


# --- one compilation -------------------------------------------------------------------------------------------------


def config_of(row: Row, per_chip: int):
    from truepose_jax.config import Config, from_config_dict

    variant = ["flow"] if row.network == "flow" else []
    name = METHODS.get(row.network) or CONFIGS[row.size]
    found = importlib.import_module(f"configs.{name}").get_config(*variant)
    found.model.remat = row.remat
    found.model.unet.update(NETWORKS.get(row.network, {}))
    found.mesh.fsdp, found.mesh.data = row.fsdp, row.chips // row.fsdp
    found.batch_size, found.optim.accumulation = per_chip * row.chips, 1
    return from_config_dict(Config, found)


def compile_here(row: Row, per_chip: int, folder: pathlib.Path, code: bool) -> None:
    """In this process; writes folder/refused.txt where the compiler refuses, and folder/whole.json where it ends."""
    import jax
    from jax.experimental import topologies

    from truepose_jax.kernels.attention.api import default_implementation
    from truepose_jax.scaling.compiled import compile_step, mesh_of

    config = config_of(row, per_chip)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=row.topology).devices
    options = OPTIONS | {"xla_dump_to": str(folder / "dump"), "xla_dump_hlo_as_text": True}
    try:
        with default_implementation(row.attention or FUSED):
            compiled = compile_step(config, mesh_of(config, devices), options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        (folder / "refused.txt").write_text(str(error))
        return
    if code:
        found = compiled.memory_analysis()
        names = ("argument", "output", "alias", "temp")
        held = {n: getattr(found, f"{n}_size_in_bytes") for n in names}
        (folder / "whole.json").write_text(json.dumps(held | {"accessed": compiled.cost_analysis()["bytes accessed"]}))


@functools.cache
def origin() -> dict:
    """What a compilation is of: it is taken for another only where all of this is the same."""
    names = ("jax", "jaxlib", "libtpu", "flax", "optax")
    versions = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return versions | {"options": OPTIONS, "sources": tpu_aot.hash_of(SOURCES)}


def kept(path: pathlib.Path) -> dict | None:
    """What a result.json says; None, and a notice, where it is broken or of other options, versions or sources."""
    try:
        found = json.loads(path.read_text())
        other = ", ".join(name for name in origin() if found["of"].get(name) != origin()[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"notice: {path} cannot be read ({error}); set aside", file=sys.stderr)
        return None
    if other:
        print(f"notice: {path} is of other {other}; set aside", file=sys.stderr)
    return None if other else found


def compiled(row: Row, per_chip: int, work: pathlib.Path, *, code: bool = False) -> dict:
    """What the compiler says of this batch per chip: {"bytes", ...} or {"refused"}; read from disk where it is there.

    Raises RuntimeError where a compilation ends otherwise.
    """
    folder = work / row.name / f"b{per_chip:04d}"
    answer, dump, log = folder / "result.json", folder / "dump", folder / "log.txt"
    found = kept(answer) if answer.exists() else None
    if found and (not code or {"memory_analysis", "refused"} & set(found)):
        return found
    of = origin()  # before the compilation: sources that change meanwhile are not what was compiled
    shutil.rmtree(folder, ignore_errors=True)
    dump.mkdir(parents=True)
    start = time.perf_counter()
    command = [sys.executable, __file__, f"--compile={row.name}", f"--batch={per_chip}", f"--work={folder}"]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *(["--code"] * code)], stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and (code or not list(dump.glob("*after_buffer_assignment.txt"))):
                time.sleep(POLL)
            cpu = cpu_seconds(process.pid) if process.poll() is None else None
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    kinds = ("buffer-assignment", "after_optimizations", "live-range")
    texts = {kind: list(dump.glob(f"*.jit_step.*{kind}.txt")) for kind in kinds}
    if (folder / "refused.txt").exists():
        text = " ".join((folder / "refused.txt").read_text().split())
        said = re.search(r"\(([\d.]+)G\) exceeds", text)
        found = {"refused": text[:500]} | ({"refused_bytes": int(float(said[1]) * GIB)} if said else {})
    elif texts["buffer-assignment"] and texts["after_optimizations"]:
        found = account(
            texts["buffer-assignment"][0].read_text(), texts["after_optimizations"][0].read_text(), row.chips
        )
        if code:
            found["memory_analysis"] = json.loads((folder / "whole.json").read_text())
    else:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{row.name}, {per_chip} per chip: {lines[-1][:300] if lines else 'no output'}; see {log}")
    found |= {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": cpu, "of": of}
    if texts["live-range"]:
        keep_peak(texts["live-range"][0], folder / "peak.txt")
    shutil.rmtree(dump)
    from input_pipeline import atomic

    atomic.write_text(answer, json.dumps(found))
    return found


def cpu_seconds(pid: int) -> float | None:
    """Of a process that runs; None where the system does not tell."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 1)


ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*?):?$", re.M)


def account(assignment: str, hlo: str, devices: int) -> dict:
    """Bytes in HBM from the compiler's buffer assignment, and what the program sends. bytes: all of it, a donated array once."""
    from truepose_jax.scaling.collectives import collective_bytes, wire_bytes

    arguments = outputs = donated = temporaries = 0
    for size, rest in ((int(size), rest) for size, rest in ALLOCATION.findall(assignment)):
        if re.search(r"\bcolor [1-9]", rest):  # VMEM, SMEM, flags
            continue
        is_argument, is_output = ", parameter " in rest, "maybe-live-out" in rest
        arguments += size * is_argument
        outputs += size * is_output
        donated += size * (is_argument and is_output)
        temporaries += size * (not is_argument and not is_output)
    sent = collective_bytes(hlo, devices)
    return {
        "bytes": arguments + outputs - donated + temporaries,
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "donated_bytes": donated,
        "temporary_bytes": temporaries,
        "collectives": sent,
        "wire_bytes": wire_bytes(sent),
        "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
    }


def keep_peak(live: pathlib.Path, to: pathlib.Path) -> None:
    """The part of the dump that names what is alive at the peak."""
    text = live.read_text(errors="replace")
    at = text.find("Live ranges at")
    to.write_text(text[at : at + 400_000] if at >= 0 else "")


# --- one row ---------------------------------------------------------------------------------------------------------


@functools.cache
def estimated(size: str, remat: bool, attention: str, network: str):
    """truepose_jax.training.memory's account of a configuration (its attention by that name, or FUSED)."""
    from truepose_jax.kernels.attention.api import default_implementation
    from truepose_jax.training.memory import estimate

    with default_implementation(attention or FUSED):
        return estimate(config_of(Row("v5e:4x4", 1, size, remat, attention, network), 1), platforms=("tpu",))


def next_batch(tried: dict[int, float], available: float, guess: int, per_image: float) -> int | None:
    """Which batch to compile next; None where the largest is known.

    tried: bytes by batch, also of refused ones (inf where the compiler did not say). The first is `guess`; then where the line
    through the nearest two meets `available`: of those on both sides of it, else of the largest two, else with per_image.
    After STRAIGHT of them it is not straight: halves.
    """
    if not tried:
        return max(guess, 1)
    fits = sorted(batch for batch, found in tried.items() if found <= available)
    refused = min((batch for batch, found in tried.items() if found > available), default=None)
    if not fits:
        needed = (tried[refused] - available) / per_image
        return None if refused == 1 else max(refused - math.ceil(needed) if needed < refused else refused // 2, 1)
    if refused == fits[-1] + 1:
        return None
    other = refused if refused is not None else fits[-2] if len(fits) > 1 else None
    slope = per_image if other is None else (tried[fits[-1]] - tried[other]) / (fits[-1] - other)
    if math.isinf(slope) or (refused is not None and len(tried) > STRAIGHT):
        return (fits[-1] + refused) // 2
    line = fits[-1] + int((available - tried[fits[-1]]) / slope) if slope > 0 else 2 * fits[-1]
    return min(max(line, fits[-1] + 1), math.inf if refused is None else refused - 1)


def measure(row: Row, work: pathlib.Path, most: int, verify: bool, said) -> dict:
    """One row of the table, from at most `most` compilations (those on disk count)."""
    guess = estimated(row.size, row.remat, row.attention, row.network)
    per_image = guess.steps["tpu"].per_image
    first = int(0.9 * guess.largest_batch(row.available, "tpu", fsdp=row.fsdp))
    on_disk = ((path, kept(path)) for path in work.glob(f"{row.name}/b*/result.json"))
    answers = {int(path.parent.name[1:]): found for path, found in on_disk if found is not None}
    while True:
        tried = {batch: found.get("bytes", found.get("refused_bytes", math.inf)) for batch, found in answers.items()}
        batch = next_batch(tried, row.available, first, per_image)
        fits = [batch for batch, found in tried.items() if found <= row.available]
        is_one_more = bool(fits) and batch == max(fits) + 1
        if batch is None or len(answers) >= most or (is_one_more and not verify):
            break
        said(f"{row.name}, {batch} per chip")
        answers[batch] = compiled(row, batch, work)
    return summary(row, dict(sorted(answers.items())), guess)


def summary(row: Row, answers: dict[int, dict], guess) -> dict:
    fits = [batch for batch, found in answers.items() if found.get("bytes", math.inf) <= row.available]
    refused = [batch for batch in answers if batch not in fits]
    best = answers[fits[-1]] if fits else {}
    line = None
    if len(fits) > 1:
        line = (best["bytes"] - answers[fits[0]]["bytes"]) / (fits[-1] - fits[0])
    expected = guess.bytes(fits[-1], "tpu", fsdp=row.fsdp) if fits else None
    return {
        "row": row.name,
        **dataclasses.asdict(row),
        "chips": row.chips,
        "available_bytes": row.available,
        "largest_compiled_that_fits": fits[-1] if fits else 0,
        "one_more_is_refused": bool(fits) and fits[-1] + 1 in refused,
        "refused": refused,
        **{name: best.get(name) for name in KEPT},
        "bytes_per_image": line,
        "estimate_bytes": expected,
        "estimate_ratio": expected / best["bytes"] if fits else None,
        "estimate_bytes_per_image": guess.steps["tpu"].per_image,
        "estimate_largest": guess.largest_batch(row.available, "tpu", fsdp=row.fsdp),
        "accessed_bytes": best.get("memory_analysis", {}).get("accessed"),
        "compilations": len(answers),
        "cpu_seconds": [found.get("cpu_seconds") for found in answers.values()],
        "tried": {str(batch): found.get("bytes") for batch, found in answers.items()},
        "of": tables.words(origin() | {"machine": f"one core of {os.cpu_count()}, {os.uname().sysname} {os.uname().machine}"}),
    }


@program
def main(argv: Sequence[str]) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", type=pathlib.Path, help="folder of the virtual environment to make and run in")
    parser.add_argument("--rows", default="", help="only rows whose name this expression finds")
    parser.add_argument("--compilations", type=int, help=f"most compilations of a row ({COMPILATIONS})")
    parser.add_argument("--verify", action="store_true", help="also compile one more than fits, which must be refused")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "tpu_train_step")
    parser.add_argument("--out", type=pathlib.Path, default=tables.RESULTS)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help="with --rows of one row: compile this batch only")
    parser.add_argument("--code", action="store_true", help="with --batch: generate code too and keep memory_analysis")
    flags = parser.parse_args(argv)
    by_name = {row.name: row for row in ROWS}
    if flags.compile:
        compile_here(by_name[flags.compile], flags.batch, flags.work, flags.code)
        return 0
    wanted, path = _checked(parser, flags), tables.result(parser, flags.out, "tpu_train_step")
    if flags.list:
        print("\n".join(row.name for row in wanted))
        return 0
    if flags.setup is not None:
        given = list(argv)
        at = next(i for i, text in enumerate(given) if text.startswith("--setup"))
        del given[at : at + (1 if "=" in given[at] else 2)]
        return subprocess.run([set_up(flags.setup), __file__, *given]).returncode
    if not importlib.util.find_spec("libtpu"):
        parser.error("this Python has no libtpu; --setup=FOLDER makes an environment that has")
    from tqdm import tqdm

    order, rows = list(by_name), tables.read(path)
    with tqdm(wanted, unit="row") as bar:
        for row in bar:
            if flags.batch:
                compiled(row, flags.batch, flags.work, code=flags.code)
            most = 0 if flags.batch else COMPILATIONS if flags.compilations is None else flags.compilations
            found = measure(row, flags.work, most, flags.verify, bar.set_description)
            rows = tables.merged(rows, [found], lambda row: row["row"])
            rows = sorted((row for row in rows if row["row"] in order), key=lambda row: order.index(row["row"]))
            tables.write(path, {"rows": rows}, report(rows, order))
    print(path.with_suffix(".md").read_text())
    return 0


def _checked(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> list[Row]:
    """The rows that are asked for; ends with one line and code 2 where something cannot work."""
    try:
        wanted = [row for row in ROWS if re.search(flags.rows, row.name)]
    except re.error as error:
        parser.error(f"--rows={flags.rows} is no regular expression ({error})")
    if not wanted:
        parser.error(f"no row's name has '{flags.rows}'; --list prints them")
    if flags.batch is None and flags.code:
        parser.error("--code is for --batch=N: name the batch")
    for name in ("verify", "compilations"):
        if flags.batch is not None and getattr(flags, name) is not parser.get_default(name):
            parser.error(f"--{name} is of the search for the largest batch and --batch names one; leave one out")
    if flags.batch is not None and len(wanted) > 1:
        parser.error(f"--batch is for one row and --rows={flags.rows} finds {len(wanted)}")
    for name, least in (("batch", 1), ("compilations", 0)):
        if (value := getattr(flags, name)) is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
