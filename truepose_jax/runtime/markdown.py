"""Markdown that people read in an editor or a diff: no line wider than WIDTH, wide tables cut into narrow ones."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

WIDTH = 130
FRONT = re.compile(r"(?:---\n.*?\n---\n)?", re.DOTALL)
FENCE = re.compile(r"^\s*(```|~~~)(.*)$")
ITEM = re.compile(r"^(\s*)([-*+]|\d+\.)\s+")
SHELL_WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|\S)+")
LOOKS_LIKE_A_BLOCK = re.compile(r" (?=(?:[-+*>#=|]+|\d+[.)])(?: |$))")
"""Before a word that would start a list, heading or table, were it first in its line."""
CODE = re.compile(r"`[^`]+`")
ONE_LINE = 100
"""Pieces of code up to this long are not broken."""
GLUE = "\x00"
"""A space at which no line may end."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def narrow(text: str, width: int = WIDTH) -> str:
    """The same page with no line over `width`: paragraphs and list items with such a line are filled anew, shell commands go
    on after a backslash, tables are cut by columns, each part with the leading columns that name its rows; a table with a
    cell that no part could hold becomes a list. Front matter, code that is not shell, and words wider than a line stay."""
    front, text = FRONT.match(text)[0], FRONT.sub("", text, count=1)
    return front + "\n".join(line for block in _blocks(text.split("\n")) for line in _narrow(block, width))


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Runs of lines that belong together: a fence, a table, a list item, a paragraph; every other line for itself."""
    block: list[str] = []
    fence = ""
    for line in lines:
        found = FENCE.match(line)
        if fence:
            block.append(line)
            if found and found[1] == fence:
                yield block
                block, fence = [], ""
            continue
        plain = line.strip() and not line.startswith("#") and not found
        goes_on = block and plain and not ITEM.match(line) and line.startswith("|") == block[0].startswith("|")
        if not goes_on and block:
            yield block
            block = []
        if found:
            block, fence = [line], found[1]
        elif plain:
            block.append(line)
        else:
            yield [line]
    if block:
        yield block


def _narrow(block: list[str], width: int) -> list[str]:
    if all(len(line) <= width for line in block) or block[0].startswith("#"):
        return block
    if fence := FENCE.match(block[0]):
        return [part for line in block for part in _command(line, width)] if fence[2].strip() in ("", "sh") else block
    if block[0].startswith("|"):
        return _table(block, width)
    return fill(" ".join(line.strip() for line in block), width, indent=re.match(r"\s*", block[0])[0])


def fill(text: str, width: int = WIDTH, indent: str = "") -> list[str]:
    """One paragraph or list item as lines of at most `width`; short pieces of code stay in one line."""
    item = ITEM.match(text)
    text = CODE.sub(lambda code: code[0].replace(" ", GLUE) if len(code[0]) <= ONE_LINE else code[0], text)
    text = (
        LOOKS_LIKE_A_BLOCK.sub(GLUE, text) if not item else item[0] + LOOKS_LIKE_A_BLOCK.sub(GLUE, text[item.end() :])
    )
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + " " * (item.end() if item else 0),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in lines]


def _command(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    if remark := re.match(r"(.*\S)\s+(# .*)$", line):
        return [remark[2], *_command(remark[1], width)]
    lines = [""]
    for word in SHELL_WORD.findall(line):
        if lines[-1].strip() and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _table(block: list[str], width: int) -> list[str]:
    head, rule, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("| \t"))] for line in block)
    columns = len(head)
    rows = [(row + [""] * columns)[:columns] for row in rows]
    keys = next((k for k in range(1, columns) if len({tuple(row[:k]) for row in rows}) == len(rows)), 1)
    lines = [head, rule, *rows]
    sizes = [max(len(line[i]) for line in lines) + 3 for i in range(columns)]
    room = width - 1 - sum(sizes[:keys])
    if max(sizes[keys:], default=0) > room:
        return _listed(head, rows, width)
    parts = _cut(sizes, keys, room, columns)
    parts = _cut(sizes, keys, room, -(-(columns - keys) // len(parts)))
    found = [["| " + " | ".join(line[i] for i in [*range(keys), *part]) + " |" for line in lines] for part in parts]
    return list(itertools.chain(*([*part, ""] for part in found[:-1]), found[-1]))


def _cut(sizes: Sequence[int], first: int, room: int, most: int) -> list[list[int]]:
    """Columns from `first` on as runs of at most `most` that fit into `room`."""
    parts: list[list[int]] = [[]]
    for i in range(first, len(sizes)):
        if sum(sizes[j] for j in [*parts[-1], i]) > room or len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(i)
    return parts


def _listed(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    found = []
    for first, *rest in rows:
        said = "; ".join(f"{name}: {cell}" if name else cell for name, cell in zip(head[1:], rest, strict=True) if cell)
        found += fill(f"- **{first}** {said}" if first else f"- {said}", width)
    return found
