"""Rating by people: a blinded sheet that needs no server, and the scorer of the answers.

    python experiments/rating.py sheet --reference=DIR --method=NAME=DIR --method=NAME=DIR --size=512x352 --out=DIR
    python experiments/rating.py score --key=DIR/key.csv --answers=FILE.csv

| number | question | better |
|---|---|---|
| R2G | share of real photos taken for generated | - |
| G2R | share of a method's images taken for real | higher |
| Jab | share of comparisons in which a method's image was chosen | higher |

A sheet is a folder: `sheet.html` and `images/` go to the raters with `answers.csv`, which they fill in; `key.csv`
tells which image is whose and stays here.
"""

from __future__ import annotations

import collections
import csv
import html
import itertools
import json
import pathlib
import random
import sys
from collections.abc import Mapping, Sequence

from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from input_pipeline.annotations.photo import one_line, read_photo
from input_pipeline.files import read_list
from input_pipeline.schema import InputError
from truepose_jax.evaluate.pairing import Folder, pair_folders
from truepose_jax.runtime.cli import Parser, parse_size, run_program

REAL = "real"
TITLE = 'Rating of pictures: write "real" or "generated" for part 1, and a letter for part 2, into answers.csv'
KEY_COLUMNS = ("question", "choice", "method", "name")
ANSWER_COLUMNS = ("question", "answer")


def make_sheet(argv: Sequence[str]) -> None:
    """sheet: writes the folder. Raises InputError."""
    parser = Parser(prog="python experiments/rating.py sheet", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--reference", required=True, metavar="DIR", help="true images")
    add("--method", action="append", required=True, metavar="NAME=DIR", help="generated images, once per method")
    add(
        "--size",
        type=parse_size,
        required=True,
        metavar="HxW",
        help="at which all are shown, so that size tells nothing",
    )
    add("--count", type=int, default=30, help="real images, images per method, and comparisons (30)")
    add("--seed", type=int, default=0)
    add("--out", required=True, metavar="DIR", help="a new folder")
    flags = parser.parse_args(argv)
    out = pathlib.Path(flags.out)
    if out.exists():
        raise InputError(f"--out={out}: is there already; give the name of a new folder")
    reference = Folder.read(flags.reference, flag="--reference")
    methods = {}
    for given in flags.method:
        name, _, folder = given.partition("=")
        if not folder or name in {*methods, REAL}:
            raise InputError(f"--method={given}: give NAME=DIR, each name once, and not '{REAL}'")
        methods[name] = Folder.read(folder, flag=f"--method={name}")
    targets = _targets(methods, reference)
    most = len(targets) // (2 if len(methods) > 1 else 1)
    if not 1 <= flags.count <= most:
        raise InputError(
            f"--count is {flags.count}; all methods generated {len(targets)} images"
            + (", and true images of comparisons are no questions of their own" if len(methods) > 1 else "")
            + f": 1 to {most}"
        )
    questions, comparisons = _draw(methods, targets, flags.count, random.Random(flags.seed))
    try:
        _write_sheet(out, reference, methods, questions, comparisons, flags.size)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written ({one_line(error)})") from error
    print(f"{out}: {len(questions)} single pictures and {len(comparisons)} comparisons; keep {out / 'key.csv'} back")


def _targets(methods: Mapping[str, Folder], reference: Folder) -> dict[str, dict[str, str]]:
    """{true image: {method: its image}} of those that all methods have, made from one source where names tell it."""
    made: dict[str, dict[str, dict[str | None, str]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for method, folder in methods.items():
        for pair in pair_folders(folder, reference).pairs:
            made[pair.reference][method][pair.source] = pair.generated
    found = {}
    for name, images in sorted(made.items()):
        told = [set(sources) for sources in images.values() if None not in sources]
        shared = sorted(set.intersection(*told)) if told else [None]
        if len(images) == len(methods) and shared:
            found[name] = {method: sources.get(shared[0], sources.get(None)) for method, sources in images.items()}
    return found


def _draw(
    methods: Mapping[str, Folder], targets: Mapping[str, Mapping[str, str]], count: int, dice: random.Random
) -> tuple[list[tuple[str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """([(method or REAL, name)] shuffled, [(true image, [(method, name)] shuffled)]). A comparison shows its true image as
    such, and that answers the question whether it is real: the two are drawn apart."""
    names = dice.sample(list(targets), len(targets))
    compared = names[:count] if len(methods) > 1 else []
    questions = [(REAL, name) for name in dice.sample(names[len(compared) :], count)]
    for method in methods:
        questions += [(method, targets[name][method]) for name in dice.sample(names, count)]
    dice.shuffle(questions)
    comparisons = []
    for name in compared:
        choices = list(targets[name].items())
        dice.shuffle(choices)
        comparisons.append((name, choices))
    return questions, comparisons


def _write_sheet(
    out: pathlib.Path,
    reference: Folder,
    methods: Mapping[str, Folder],
    questions: Sequence[tuple[str, str]],
    comparisons: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    size: tuple[int, int],
) -> None:
    (out / "images").mkdir(parents=True)
    key, asked = [], []

    def picture(method: str, name: str, file: str) -> str:
        """A copy without its metadata and name; its HTML."""
        folder = reference if method == REAL else methods[method]
        image = Image.fromarray(read_photo(folder.path(name))).resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(out / "images" / f"{file}.png")
        return f'<img src="images/{file}.png" alt="{file}">'

    body = [f"<h1>{html.escape(TITLE)}</h1>", "<h2>1. Is it a photo (real) or generated?</h2>"]
    for number, (method, name) in enumerate(questions, 1):
        question = f"S{number:04d}"
        body.append(f"<figure>{picture(method, name, question)}<figcaption>{question}</figcaption></figure>")
        key.append((question, "", method, name))
        asked.append(question)
    body.append("<h2>2. Which picture shows the person of the first one best?</h2>" if comparisons else "")
    for number, (name, choices) in enumerate(comparisons, 1):
        question = f"C{number:04d}"
        cells = [f"<figure>{picture(REAL, name, question)}<figcaption>{question}: true</figcaption></figure>"]
        for index, (method, image) in enumerate(choices):
            letter = chr(ord("A") + index)
            cells.append(
                f"<figure>{picture(method, image, question + letter)}<figcaption>{letter}</figcaption></figure>"
            )
            key.append((question, letter, method, image))
        body.append(f"<section>{''.join(cells)}</section>")
        asked.append(question)
    style = "figure{display:inline-block;margin:8px;text-align:center;font-family:sans-serif}"
    page = f'<!doctype html><meta charset="utf-8"><title>Rating</title><style>{style}</style>\n' + "\n".join(body)
    (out / "sheet.html").write_text(page + "\n", encoding="utf-8")
    _write_csv(out / "key.csv", KEY_COLUMNS, key)
    _write_csv(out / "answers.csv", ANSWER_COLUMNS, [(question, "") for question in asked])


def score(argv: Sequence[str]) -> None:
    """score: R2G, G2R and Jab of one or more filled answers.csv. Raises InputError."""
    parser = Parser(prog="python experiments/rating.py score", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--key", required=True, metavar="CSV", help="key.csv of the sheet")
    parser.add_argument("--answers", action="append", required=True, metavar="CSV", help="once per rater")
    flags = parser.parse_args(argv)
    key: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for row in _read_csv(flags.key, KEY_COLUMNS):
        key[row["question"]][row["choice"].upper()] = row["method"]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for path in flags.answers:
        for line, row in enumerate(_read_csv(path, ANSWER_COLUMNS), 2):
            question, answer = row["question"].strip(), row["answer"].strip()
            if answer and question in key:
                _count(counts, key[question], answer, f"{path}, line {line}")
            elif answer:
                raise InputError(f"{path}, line {line}: the key has no question '{question}'")
    if not counts:
        raise InputError(f"{', '.join(flags.answers)}: no question is answered")
    print(json.dumps(_shares(counts), indent=1))


def _count(counts: Mapping[str, collections.Counter[str]], choices: Mapping[str, str], answer: str, where: str) -> None:
    if "" in choices:
        if answer.lower() not in {REAL, "generated"}:
            raise InputError(f"{where}: '{answer}'; write real or generated")
        counts[choices[""]]["seen"] += 1
        counts[choices[""]][answer.lower()] += 1
        return
    if answer.upper() not in choices:
        raise InputError(f"{where}: '{answer}'; write one of {', '.join(choices)}")
    for letter, method in choices.items():
        counts[method]["compared"] += 1
        counts[method]["chosen"] += letter == answer.upper()


def _shares(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """{method: {number: share, "answers": ...}}."""
    found: dict[str, dict[str, float]] = {}
    for method, n in sorted(counts.items()):
        found[method] = {}
        if n["seen"]:
            mistaken = n["generated"] if method == REAL else n[REAL]
            found[method]["R2G" if method == REAL else "G2R"] = mistaken / n["seen"]
            found[method]["pictures"] = n["seen"]
        if n["compared"]:
            found[method] |= {"Jab": n["chosen"] / n["compared"], "comparisons": n["compared"]}
    return found


def _write_csv(path: pathlib.Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def _read_csv(path: str, columns: Sequence[str]) -> list[dict[str, str]]:
    lines = [cells for _, cells in read_list(path)]
    if not lines or lines[0] != list(columns):
        raise InputError(f"{path}: the first line must be {','.join(columns)}")
    return [dict(itertools.zip_longest(columns, cells[: len(columns)], fillvalue="")) for cells in lines[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"sheet": make_sheet, "score": score}
    if not argv or argv[0] not in commands:
        Parser(prog="python experiments/rating.py").error(f"say {' or '.join(commands)} first")
    return run_program(commands[argv[0]], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
