"""What each FID is measured against: a folder of images, or a file of their statistics. All that is given is used, or refused."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from input_pipeline.schema import InputError
from truepose_jax.evaluate import statistics
from truepose_jax.evaluate.pairing import Folder, image_key, read_names, summarize
from truepose_jax.evaluate.weights import PUBLISHED
from truepose_jax.metrics.fid import FID_KINDS


def fid_sources(given: Sequence[str], names: str | None, metrics: Sequence[str]) -> dict[str, Folder | str]:
    """{metric: its folder (only the images named) or statistics file} of --fid-reference and --fid-names.

    metrics: those whose weights are given. Raises InputError for what is neither, and for what would go unused.
    """
    files = _files([source for source in given if os.path.isfile(source)], metrics)
    folders = [source for source in given if not os.path.isfile(source)]
    if len(folders) > 1:
        raise InputError(f"--fid-reference={folders[1]}: one folder of images is enough; give the others' statistics")
    if names and not folders:
        raise InputError(f"--fid-names={names}: chooses among images, and --fid-reference is a file; leave it out")
    if not folders:
        return dict(files)
    without_file = [metric for metric in metrics if metric not in files]
    if not without_file:
        raise InputError(
            f"--fid-reference={folders[0]}: unused beside {', '.join(files.values())}; leave one of them out"
        )
    folder = Folder.read(folders[0], flag="--fid-reference")
    return files | dict.fromkeys(without_file, _named(folder, names) if names else folder)


def _files(given: Sequence[str], metrics: Sequence[str]) -> dict[str, str]:
    """{metric: statistics file}, at most one each."""
    found: dict[str, str] = {}
    for path in given:
        metric = statistics.read(pathlib.Path(path))[1].get("metric")
        if metric not in FID_KINDS:
            raise InputError(f"--fid-reference={path}: statistics of {metric}; give those of {' or '.join(FID_KINDS)}")
        if metric not in metrics:
            raise InputError(f"--fid-reference={path}: statistics of {metric}; give {PUBLISHED[metric].flag} too")
        if metric in found:
            raise InputError(f"--fid-reference={path}: statistics of {metric}, as {found[metric]}; give one of them")
        found[metric] = path
    return found


def _named(folder: Folder, names: str) -> Folder:
    """Only the images of the list. Raises InputError where one is not there, or there twice."""
    wanted = read_names(names)
    chosen = folder.chosen([name for name in folder.names if image_key(name) in wanted])
    if absent := sorted(wanted - {image_key(name) for name in chosen.names}):
        raise InputError(
            f"--fid-reference={folder.root}: {summarize(absent)} of --fid-names={names} not there; complete it"
        )
    chosen.images()
    return chosen
