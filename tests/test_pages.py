"""Pages for people: narrow lines, short first pages, and nothing that they or comments point to is missing."""

import pathlib
import re
import subprocess

import pytest

from truepose_jax.runtime.markdown import WIDTH, narrow

ROOT = pathlib.Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", "runs", "build", "dist", "node_modules"}
LONGEST = {"README.md": 120, "BUILD_NOTES.md": 200}
ELSEWHERE = re.compile(
    r"\b(methods|stack|house|house_next|more_methods|picture_recipe|readings)\.md\b|(?<![\w.])/(work|home|root|Users|farm)/\w"
)
NAMED = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)+[\w-]+\.(?:py|md|json|png|sh|sbatch|npz))(?![\w/])")
MADE_BY_USERS = re.compile(r"(runs|out|photos|mine|records|parsing|keypoints|image|anna|bob|RAW)/|.*/[A-Z]+\.\w+$")
"""Files that commands in the pages make or read, and placeholders."""


def _files() -> list[pathlib.Path]:
    """What git knows or would take in; without git, what lies there."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not SKIPPED & set(p.relative_to(ROOT).parts)]


FILES = _files()
PAGES = [path for path in FILES if path.suffix == ".md"]
EXPLAINED = [p for p in PAGES if p.parent == ROOT or p.parts[len(ROOT.parts)] in ("docs", "launch")]


def _name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_lines_are_narrow(page):
    wide = [number for number, line in enumerate(page.read_text().splitlines(), 1) if len(line) > WIDTH]
    assert not wide, (
        f"{_name(page)}: lines {wide} are over {WIDTH} characters; truepose_jax.runtime.markdown.narrow mends them"
    )


@pytest.mark.parametrize(("name", "most"), LONGEST.items())
def test_first_pages_are_short(name, most):
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= most, f"{name} has {lines} lines; {most} are allowed"


def test_nothing_points_out_of_the_repository():
    found = []
    for path in FILES:
        if path.suffix in {".md", ".py", ".sh", ".sbatch", ".toml"} and path != pathlib.Path(__file__):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if ELSEWHERE.search(line):
                    found.append(f"{_name(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"\w+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", EXPLAINED, ids=_name)
def test_files_that_pages_name_are_there(page):
    for name in NAMED.findall(page.read_text()):
        places = (ROOT, ROOT / "truepose_jax", page.parent)
        if not MADE_BY_USERS.match(name):
            assert any((place / name).exists() for place in places), f"{_name(page)} names {name}"


def test_sections_that_comments_cite_are_there():
    """`docs/paper.md 8.2`, `docs/paper.md A17`."""
    text = (ROOT / "docs/paper.md").read_text()
    there = set(re.findall(r"^#+ ([\d.]+?)\.? ", text, re.M)) | set(re.findall(r"^- \*\*(A\d+)\*\*", text, re.M))
    for path in FILES:
        if path.suffix in {".py", ".md"} and path != pathlib.Path(__file__):
            for cited in re.findall(r"docs/paper\.md,? (A\d+|\d+(?:\.\d+)?)\b", path.read_text()):
                assert cited in there, f"{_name(path)} cites docs/paper.md {cited}"


def test_narrow_fills_paragraphs_and_cuts_tables():
    word = "word " * 40
    page = f"# A title\n\n- an item, {word}\n- 2 of `some short code that stays in one line` {word}- 3\n\nshort\nlines stay\n"
    made = narrow(page)
    assert max(map(len, made.splitlines())) <= WIDTH and made.endswith("short\nlines stay\n")
    assert made.split() == page.split() and "`some short code that stays in one line`" in made
    assert not re.search(r"^ *- 3", made, re.M), "a dash in a text is no list"
    assert narrow(made) == made

    front = f"---\nname: {word}\n---\n"
    assert narrow(front + page) == front + made

    cells = [f"{'value' * 5}{i}" for i in range(9)]
    table = "\n".join(
        "| " + " | ".join(row) + " |" for row in (["key", *cells], ["---"] * 10, ["a", *cells], ["b", *cells])
    )
    parts = narrow(table).split("\n\n")
    assert len(parts) > 1 and all(len(line) <= WIDTH for part in parts for line in part.splitlines())
    assert all([line.split("|")[1].strip() for line in part.splitlines()] == ["key", "---", "a", "b"] for part in parts)
    assert all(cell.strip() in narrow(table) for cell in cells)

    listed = narrow(f"| what | said |\n|---|---|\n| x | {word}|\n")
    assert listed.startswith("- **x** said: word") and max(map(len, listed.splitlines())) <= WIDTH


def test_narrow_breaks_commands_where_a_shell_goes_on():
    flags = " ".join(f"'--flag{i}=two words'" for i in range(12))
    made = narrow(f"```sh\npython -m program {flags}  # a remark\n```\n```python\n{'x' * 140}\n```\n")
    first, command = made.splitlines()[1:3]
    assert first == "# a remark" and command.endswith(" \\")
    joined = made.replace(" \\\n   ", "")
    assert f"python -m program {flags}\n" in joined and "x" * 140 in made
