"""What all command-line programs do alike: bad input gets one clear line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from input_pipeline.schema import InputError, UserError, printable
from truepose_jax.runtime.bundled import find_config

BAD_INPUT = 2
HELP = {"-h", "--help", "-help"}
INTERRUPTED = 130
CACHE_BYTES = 8 << 30
"""Compiled programs that enable_compilation_cache keeps: a full-size train step is some 100 MB."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line (argparse's own prints the usage first); exits with 2."""

    @classmethod
    def of_program(cls, name: str, docstring: str) -> Parser:
        """Of truepose_jax.NAME. Its help is the docstring: the first paragraph, the flags, the others."""
        summary, details = docstring.split("\n\n", 1)
        style = argparse.RawDescriptionHelpFormatter
        prog = f"python -m truepose_jax.{name}"
        return cls(prog=prog, description=summary, epilog=details, formatter_class=style, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}; see --help\n")


def run_program(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """main(argv); returns its exit code (None: 0).

    A UserError is printed as `error: ...`, and 2 is returned; so is what the system says of a file or of memory. Other
    exceptions are bugs and keep their tracebacks.
    """
    # Pillow's warning about large pictures: check_size of photo.py is stricter, and its one line says what to do.
    warnings.filterwarnings("ignore", message="Image size .* decompression bomb")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of odd tags in photos
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it cannot read is told in our own line
    with contextlib.suppress(AttributeError):  # names of files need not be text; another's stdout need not be a file
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (UserError, OSError, MemoryError) as error:
        text = str(error) if isinstance(error, UserError) else _of_the_system(error)
        if text is None:
            raise
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr)
    return BAD_INPUT


def program(run: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """`@program` of main(argv): main(argv=None) is run_program of it, over the command's own words where none are given."""

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        return run_program(run, sys.argv[1:] if argv is None else argv)

    return main


def _of_the_system(error: OSError | MemoryError) -> str | None:
    """One line where the cause lies outside of the program: the standard output, a file, memory. None: it may be a bug."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({printable(str(error)) or 'for this'}); make what is asked for smaller"
    if error.filename is None:
        try:
            print(flush=True)
        except OSError as cause:
            # The interpreter would try again at its end, and say so in several lines.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return f"cannot write to the standard output ({cause.strerror})"
        return None
    name = (
        os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    )  # or an open file's number
    return printable(f"{name}: {error.strerror}; see whether it is there and may be used")


def run_with_config(main: Callable[[Sequence[str]], int | None], told: ModuleType | None = None) -> NoReturn:
    """run_program for programs whose settings are --config flags (ml_collections); exits.

    A flag that is unknown or ill-typed, a config file that is missing: one line, exit code 2. --config may be a name of
    runtime/bundled.py. told: the module of the flags, for show_help; None: absl shows them.
    """
    from absl import app, flags, logging

    if told is not None and HELP & set(sys.argv):
        show_help(told)

    def run(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save otherwise
        sys.exit(run_program(main, argv))

    app.run(run, flags_parser=parse_flags)


def show_help(told: ModuleType) -> NoReturn:
    """Prints a module of absl's flags: its docstring, then its GROUPS, {title: flags}. --helpfull is absl's, with every flag."""
    from absl import flags

    print(told.__doc__)
    for title, holders in told.GROUPS.items():
        print(f"{title}:")
        for holder in holders:
            default = ",".join(holder.default) if isinstance(holder.default, list) else holder.default
            default = f" ({default})" if default else ""
            print(f"  --{holder.name:14}{flags.FLAGS[holder.name].help}{default}")
        print()
    sys.exit(0)


def parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """The arguments that absl's flags leave; exits where a flag is wrong."""
    from absl import flags

    try:
        return flags.FLAGS(_with_config_path(argv))
    except (flags.Error, AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        print(f"error: {_why(error, argv)}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _with_config_path(argv: Sequence[str]) -> list[str]:
    """argv with the path of what --config names. Raises InputError."""
    found = list(argv)
    for number, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if word == "--":
            break
        if flag in ("--config", "-config"):
            if equals:
                found[number] = f"{flag}={find_config(value)}"
            elif number + 1 < len(argv):
                found[number + 1] = find_config(argv[number + 1])
    return found


def _why(error: Exception, argv: Sequence[str]) -> str:
    """In one line, what is wrong with these flags."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "Error whilst parsing config file" in text:  # ml_collections puts a whole traceback there
        text = text.strip().splitlines()[-1]
        if "get_config() takes" in text:
            text = (
                f"{next((w for w in argv if ':' in w), '--config')}: this experiment has no variants; leave ':...' out"
            )
    elif key := re.match(r"[\"']+(\w+)[\"']+", text):
        named = [flag for flag in (w.partition("=")[0] for w in argv) if key[1] in flag.split(".")[1:]]
        text = f"{named[0]}: there is no such setting. {text[key.end() :]}" if named else text
    return " ".join(text.split()) or type(error).__name__


KEPT_FROM = 0.1
"""Seconds of compilation from which a program is kept. JAX's own 1 s leaves out what makes parameters and restores them."""


def enable_compilation_cache() -> None:
    """Lets XLA keep its compiled programs on disk (~/.cache/truepose_jax/programs, at most CACHE_BYTES), so that the next
    start need not compile them again. JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    turns it off."""
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = pathlib.Path(home, "truepose_jax", "programs")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        drop_half_written(folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM)


def drop_half_written(folder: pathlib.Path) -> None:
    """Removes what a start that was killed left of a program: JAX writes KEY-cache, then KEY-atime, under this lock; it never
    replaces the first, and keeps nothing more where it misses the second."""
    import filelock

    with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=10):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)


def install(extra: str) -> str:
    """How to install an extra of pyproject.toml: no registry has this package, so from its own folder."""
    return f"pip install -e '.[{extra}]' in the project's folder"


def reject_unused_flags(
    flags: argparse.Namespace, used_by: Mapping[str, Sequence[str]], *modes: str, title: str = ""
) -> None:
    """Raises InputError for a flag that was given and that nothing of this call reads.

    used_by: {flag: modes that heed it}; the parser's default of such a flag is None. modes: of this call. title: what to
    call them, if not by their names.
    """
    for flag, heeding in used_by.items():
        if getattr(flags, flag.replace("-", "_")) is not None and not set(heeding) & set(modes):
            raise InputError(
                f"--{flag.replace('_', '-')} means nothing to {title or ' and '.join(modes)}; it is for {', '.join(heeding)}"
            )


def parse_size(text: str) -> tuple[int, int]:
    """'256x176' -> (256, 176), height first. A `type` for add_argument: raises ArgumentTypeError."""
    h, _, w = text.partition("x")
    if not (h.isdecimal() and w.isdecimal() and int(h) > 0 and int(w) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, as in 256x176")
    return int(h), int(w)
