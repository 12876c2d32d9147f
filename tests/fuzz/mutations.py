"""Good files made bad: bytes, JSON, lists, and what a name may stand for. Everything follows from the given random.Random."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import random
from typing import Any

KINDS = {
    "empty": b"",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "a GIF": b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x01D\x00;",
    "a zip": b"PK\x03\x04" + bytes(60),
    "a pickle": b"\x80\x02cposix\nsystem\nq\x00.",
    "zeros": bytes(5000),
    "no text": bytes(range(256)) * 4,
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "400 digits": b'{"people": ' + b"9" * 400 + b"}",
    "NaN": b'{"people": [{"pose_keypoints_2d": [NaN, Infinity, -Infinity]}]}',
    "null": b"null",
    "a number": b"1e999",
}
ODD: tuple[Any, ...] = (
    None, True, False, [], {}, "", "x", "\0", "../../x", "a\nb", -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -1e308, 0.5, [[]], [None],
    {"a": None},
    "nan", [1, 2], "é" * 300,
)  # fmt: skip
CELLS = (
    "", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b", "x" * 300, "x" * 300 + ".png", "a b", '"', "a,b", "a;b", "nan",
    "-1", "loop",
    "loop/x.png", "fifo", "folder", "é.png", "\x1b[31m.png", "none", "0.png#1", "1e999", "source", "0x0", "99999999999x9",
)  # fmt: skip


def special(path: pathlib.Path, rng: random.Random) -> str:
    """Puts something that is no plain file in the place of `path`; returns what."""
    what = rng.choice(("nothing", "a folder", "a pipe", "a circle of links", "an endless device"))
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a circle of links":
        path.symlink_to(path)
    elif what == "an endless device":
        path.symlink_to("/dev/zero")
    return what


def other_kind(path: pathlib.Path, rng: random.Random) -> str:
    what = rng.choice(sorted(KINDS))
    path.write_bytes(KINDS[what])
    return what


def damage(path: pathlib.Path, rng: random.Random) -> str:
    """Bytes flipped, lost, added, moved; may be harmless."""
    data = bytearray(path.read_bytes()) or bytearray(b" ")
    how = rng.choice(("flip", "flips", "cut", "grow", "splice", "head", "numbers"))
    place = rng.randrange(len(data))
    if how == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif how == "flips":
        for _ in range(rng.randrange(1, 200)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == "cut":
        del data[place:]
    elif how == "grow":
        data[place:place] = rng.randbytes(rng.randrange(1, 3000))
    elif how == "splice":
        other = rng.randrange(len(data))
        data[place : place + 50] = data[other : other + 70]
    elif how == "head":
        data[: rng.randrange(1, 40)] = rng.randbytes(8)
    else:
        data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x80\x00\x00\x00"))
    path.write_bytes(data)
    return f"bytes ({how})"


def change_json(path: pathlib.Path, rng: random.Random) -> str:
    """One to three values of a good JSON file replaced, removed or repeated; may be harmless."""
    content = json.loads(path.read_text())
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content, what = _changed(copy.deepcopy(content), rng)
        said.append(what)
    path.write_text(json.dumps(content))
    return "JSON: " + ", ".join(said)


def _changed(content: Any, rng: random.Random) -> tuple[Any, str]:
    if not isinstance(content, dict | list) or not content or rng.random() < 0.05:
        odd = rng.choice(ODD)
        return odd, f"{str(content)[:20]!r} is {str(odd)[:20]!r}"
    key = rng.choice(sorted(content)) if isinstance(content, dict) else rng.randrange(len(content))
    if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.75:
        content[key], what = _changed(content[key], rng)
        return content, f"{key}: {what}"
    how = rng.random()
    if how < 0.2:
        del content[key]
        return content, f"no {key}"
    if how < 0.3 and isinstance(content, list):
        content.insert(key, copy.deepcopy(content[key]))
        return content, f"{key} twice"
    odd = rng.choice(ODD)
    content[key] = odd
    return content, f"{key} is {str(odd)[:20]!r}"


def change_list(path: pathlib.Path, rng: random.Random) -> str:
    """A cell, a row or the marks of a list changed; may be harmless."""
    lines = path.read_text().splitlines()
    row = rng.randrange(len(lines))
    how = rng.choice(("cell", "cell", "cell", "row", "header", "mark", "twice", "quote"))
    if how in ("cell", "header"):
        row = 0 if how == "header" else row
        cells = lines[row].split(",")
        place = rng.randrange(len(cells))
        cells[place] = rng.choice(CELLS)
        lines[row] = ",".join(cells)
    elif how == "row":
        lines[row] = rng.choice(("", ",,,,", "x", lines[row] + ",more,and,more", lines[row].partition(",")[0]))
    elif how == "mark":
        lines = [line.replace(",", rng.choice(";|\t:")) for line in lines]
    elif how == "twice":
        lines.insert(row, lines[row])
    else:
        lines[row] = '"' + lines[row]
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return f"list ({how}) {lines[min(row, len(lines) - 1)][:40]!r}"
