"""Pictures that `generate --overwrite` has still to replace, so that each stands until the new one takes its place.

A kill in between must not leave old ones that a second start takes for new: OLD_FILE in the folder says by inode, time and
size which files they are. It goes when none is left.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

from input_pipeline.files import MAX_TEXT, read_json
from input_pipeline.schema import InputError
from truepose_jax.runtime.files import atomic_write

OLD_FILE = "generate.old.json"

Stamp = tuple[int, int, int]


def note_old(out_dir: pathlib.Path, outs: Iterable[pathlib.Path]) -> None:
    """Writes OLD_FILE of those of the pictures that are there. Raises InputError."""
    old = {str(out): stamp for out in outs if (stamp := _stamp(out))}
    if old:
        with atomic_write(out_dir / OLD_FILE) as partial:
            partial.write_text(json.dumps(old), encoding="utf-8")


def read_old(out_dir: pathlib.Path) -> dict[str, Stamp]:
    """{picture: its stamp} of OLD_FILE; {} where there is none. Raises InputError."""
    path = out_dir / OLD_FILE
    if not path.exists():
        return {}
    advice = "remove it, and give --overwrite again"
    return {name: tuple(stamp) for name, stamp in read_json(path, {str: [int]}, limit=MAX_TEXT, advice=advice).items()}


def is_done(out: pathlib.Path, old: dict[str, Stamp]) -> bool:
    """Is the picture there, and no old one?"""
    stamp = _stamp(out)
    return stamp is not None and stamp != old.get(str(out))


def check_ours(out_dir: pathlib.Path, settings: pathlib.Path, outs: Iterable[pathlib.Path]) -> None:
    """A folder without `settings` holds none of our pictures: what lies under their names is another's. Raises InputError."""
    if not settings.exists() and (found := next((out for out in outs if out.exists()), None)):
        raise InputError(
            f"{found}: is there already, and {out_dir} holds no pictures of this program; take another --out-dir, or --overwrite"
        )


def _stamp(path: pathlib.Path) -> Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
