"""python -m truepose_jax.evaluate: the folders, the work in order, and the report. What it is told: evaluate/flags.py."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from input_pipeline.annotations.parsing import label_set
from input_pipeline.schema import InputError
from input_pipeline.shards import WHOLE, Shard
from input_pipeline.sources.folder import read_pairs
from truepose_jax.evaluate import pairing
from truepose_jax.evaluate.flags import make_parser
from truepose_jax.evaluate.pairing import NAMED, OR_ALLOW, Folder, Pairing, summarize
from truepose_jax.evaluate.program_hash import program_hash
from truepose_jax.evaluate.protocols import PROTOCOLS, Protocol, Size, check_size
from truepose_jax.evaluate.references import fid_sources
from truepose_jax.evaluate.report import summarise, table
from truepose_jax.evaluate.scores import Maps, Scorer, score_pairs, to_json
from truepose_jax.evaluate.statistics import folder_statistics, reference_statistics
from truepose_jax.evaluate.weights import PUBLISHED, Network, convert, load
from truepose_jax.metrics.fid import FID_KINDS, frechet_distance
from truepose_jax.runtime.cli import Parser, program
from truepose_jax.runtime.files import atomic_write, make_folder
from truepose_jax.runtime.shards import shard_of, signals_as_exits

PACKAGES = ("truepose-jax", "jax", "flax", "numpy", "scipy", "pillow", "opencv-python-headless")


@program
def main(argv: Sequence[str]) -> None:
    """Returns the exit code: 2, and one line on stderr, for bad input."""
    if argv and argv[0] == "weights":
        return _weights(argv[1:])
    flags = make_parser().parse_args(argv)
    _check_flags(flags, pathlib.Path(flags.out))
    with signals_as_exits():
        evaluate(flags, shard_of(flags.shard), argv)


def evaluate(flags: argparse.Namespace, share: Shard, argv: Sequence[str]) -> None:
    """This part of the work and, where it finishes the work, the report. argv: for it. Raises InputError."""
    out = pathlib.Path(flags.out)
    protocol, size = PROTOCOLS[flags.protocol], flags.size
    generated, reference = (
        Folder.read(flags.generated, flag="--generated"),
        Folder.read(flags.reference, flag="--reference"),
    )
    wanted = read_pairs(flags.pairs) if flags.pairs else None
    paired = pairing.pair_folders(generated, reference, wanted)
    paired.check(allow_missing=flags.allow_missing)
    sizes = pairing.sizes(generated, reference, paired.pairs, equal=flags.protocol == "plain")
    maps, parsing = _maps(flags, paired)
    given = {"lpips": flags.lpips_weights, "fid": flags.fid_weights, "clean_fid": flags.clean_fid_weights}
    not_computed = {
        metric: f"give {PUBLISHED[metric].flag}=FILE: {PUBLISHED[metric].where}" for metric, f in given.items() if not f
    }
    sources = fid_sources(flags.fid_reference, flags.fid_names, [metric for metric in FID_KINDS if given[metric]])
    networks = {metric: load(metric, file) for metric, file in given.items() if file}
    for metric, source in sources.items():
        if isinstance(source, str):
            reference_statistics(source, networks[metric], protocol, size)
    cache = pathlib.Path(flags.cache) if flags.cache else out.with_suffix(".cache")
    for folder in (out.parent, cache):
        make_folder(folder)
    print(describe(flags, protocol, paired, generated), flush=True)

    lpips = networks.get("lpips")
    settings = {
        "program": program_hash(),
        "folders": [str(folder.root.absolute()) for folder in (generated, reference)],
        "protocol": protocol.describe(size),
        "lpips": [lpips.name, lpips.sha256] if lpips else None,
        "maps": [maps.folder.fingerprint(), maps.labels.name] if maps else None,
    }
    scorer = Scorer(generated, reference, protocol, size, maps, lpips)
    how = {"cache": cache, "batch_size": flags.batch_size, "share": share}
    rows = score_pairs(scorer, paired.pairs, settings=settings, **how)
    made = generated.chosen([pair.generated for pair in paired.pairs])
    fids = {
        metric: measure_fid(network, made, sources.get(metric), protocol, size, **how)
        for metric, network in networks.items()
        if metric in FID_KINDS
    }
    if not share.finishes:
        print(f"{cache}: {share} is done")
        return
    metrics, regions = summarise(rows, lpips_name=lpips.name if lpips else "lpips", expected=len(paired.pairs))
    for name in ("ssim", "ssim_256"):
        if name not in metrics:
            not_computed[name] = "the images are smaller than its window"
    fid_facts = {}
    for metric, found in fids.items():
        if isinstance(found, str):
            not_computed[metric] = found
        else:
            metrics[networks[metric].name], fid_facts[metric] = found
    report = {
        "protocol": {"name": flags.protocol} | protocol.describe(size),
        "generated": {"folder": str(generated.root), "files": len(generated.names)}
        | generated.kinds()
        | {"sizes": sizes},
        "reference": {"folder": str(reference.root), "files": len(reference.names)} | reference.kinds(),
        "pairs": facts_of(paired, flags.pairs),
        "parsing": parsing,
        "fid": fid_facts,
        "weights": {metric: dict(network.facts) for metric, network in networks.items()},
        "metrics": metrics,
        "regions": regions,
        "not_computed": not_computed,
        "rows": str(rows.path),
        "command": ["python", "-m", "truepose_jax.evaluate", *argv],
        "program": program_hash(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    _write(out, report)
    print(table(report))
    print(f"{out}: the report; {rows.path}: one line per pair")


def _check_flags(flags: argparse.Namespace, out: pathlib.Path) -> None:
    check_size(flags.protocol, flags.size)
    if flags.batch_size < 1:
        raise InputError(f"--batch-size is {flags.batch_size}; it must be 1 or more")
    if out.suffix != ".json":
        raise InputError(f"--out={out}: the report is JSON; give a name that ends in .json")
    if out.is_dir() or (out.exists() and not flags.overwrite):
        raise InputError(f"{out}: is there already; give another name, or --overwrite")
    if bool(flags.parsing) != bool(flags.labels):
        raise InputError("--parsing and --labels go together: maps, and whose labels they hold")
    if flags.fid_names and not flags.fid_reference:
        raise InputError("--fid-names chooses among the images of --fid-reference, which is missing")
    if flags.fid_reference and not (flags.fid_weights or flags.clean_fid_weights):
        raise InputError(f"--fid-reference needs --fid-weights=FILE: {PUBLISHED['fid'].where}")


def _maps(flags: argparse.Namespace, paired: Pairing) -> tuple[Maps | None, dict[str, Any] | None]:
    """The parsing maps, and what the report tells of them. Raises InputError where some are missing and that is not
    allowed."""
    if not flags.parsing:
        return None, None
    maps = Maps(Folder.read(flags.parsing, flag="--parsing", maps=True), label_set(flags.labels))
    absent = maps.absent(pair.reference for pair in paired.pairs)
    if absent and not flags.allow_missing:
        raise InputError(f"--parsing={flags.parsing}: no maps of {summarize(absent)} of --reference{OR_ALLOW}")
    return maps, {"folder": str(maps.folder.root), "labels": maps.labels.name, "without_map": _named(absent)}


def measure_fid(
    network: Network,
    generated: Folder,
    source: Folder | str | None,
    protocol: Protocol,
    size: Size | None,
    *,
    cache: pathlib.Path,
    batch_size: int,
    share: Shard = WHOLE,
) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """(the number, what it was computed from), or why it cannot be: one part of several knows no number. source: images, or the
    file of their statistics. Raises InputError."""
    if source is None:
        return f"give --fid-reference=DIR|FILE for {network.metric} (the field's: all 48,674 training images)"
    how = {"cache": cache, "batch_size": batch_size, "share": share}
    if isinstance(source, str):
        reference, made_by = reference_statistics(source, network, protocol, size)
        told = {"reference": source, "reference_made_by": made_by, "statistics": source}
    else:
        title = f"{network.metric}, reference"
        reference, path = folder_statistics(source, network, protocol, size, role="truth", title=title, **how)
        told = {"reference": str(source.root), "statistics": str(path)} | source.kinds()
    title = f"{network.metric}, generated"
    made, _ = folder_statistics(generated, network, protocol, size, role="generated", title=title, **how)
    if not share.finishes:
        return "the merging call computes it"
    if min(made.count, reference.count) < 2:
        return f"{made.count} generated and {reference.count} reference images; a covariance needs 2"
    counts = {"reference_count": reference.count, "generated_count": made.count}
    facts = told | counts | {"input": FID_KINDS[network.metric].text}
    return {"mean": frechet_distance(made, reference), "count": made.count}, facts


def describe(flags: argparse.Namespace, protocol: Protocol, paired: Pairing, generated: Folder) -> str:
    how = ", ".join(f"{count} by {rule}" for rule, count in paired.rules.items())
    lines = [f"{flags.generated}: {len(generated.names)} images, {len(paired.pairs)} pairs ({how})"]
    if paired.unmatched or paired.missing:
        lines.append(f"without a reference: {len(paired.unmatched)}; not generated: {len(paired.missing)}")
    size = "x".join(map(str, flags.size)) if flags.size else "each image's own size"
    lines.append(f"protocol {flags.protocol} at {size}: {protocol.source}")
    return "\n".join(lines)


def facts_of(paired: Pairing, wanted: str | None) -> dict[str, Any]:
    """How the files were paired, and what has no partner, by name up to NAMED of them."""
    return {
        "count": len(paired.pairs),
        "by_rule": paired.rules,
        "list": wanted,
        "without_reference": _named(paired.unmatched),
        "not_generated": _named(paired.missing),
    }


def _named(names: Sequence[str]) -> dict[str, Any]:
    return {"count": len(names), "names": list(names[:NAMED])}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(out: pathlib.Path, report: Mapping[str, Any]) -> None:
    with atomic_write(out) as partial:
        partial.write_text(json.dumps(to_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _weights(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m truepose_jax.evaluate weights", description=convert.__doc__, allow_abbrev=False)
    parser.add_argument("--pth", action="append", required=True, metavar="FILE", help="may be given more than once")
    parser.add_argument("--out", required=True, metavar="SAFETENSORS")
    flags = parser.parse_args(argv)
    for name, digest in convert(flags.pth, flags.out).items():
        print(f"{name}: sha256 {digest}")
    print(f"{flags.out}: written")


if __name__ == "__main__":
    sys.exit(main())
