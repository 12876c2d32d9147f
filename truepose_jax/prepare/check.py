"""`prepare check`: is a built dataset whole and sound?"""

from __future__ import annotations

import argparse

from input_pipeline.records.check import check_records
from input_pipeline.schema import InputError
from input_pipeline.shards import Shard


def add_check(commands) -> None:
    """The flags of `check`."""
    parser = commands.add_parser("check", help="read every record of a built dataset and say what is wrong")
    parser.add_argument("records", metavar="DIR", help="what `build --out` wrote")
    parser.set_defaults(run=check)


def check(flags: argparse.Namespace, share: Shard) -> None:
    """Prints the facts and every defect. Raises InputError (exit code 2) where there is one; a part of several leaves that to
    the call that merges."""
    defects, facts = check_records(flags.records, share=share)
    if not share.finishes:
        print(f"{flags.records}: {share} is done")
        return
    for line in facts:
        print(line)
    for line in defects:
        print(f"defect: {line}")
    if defects:
        raise InputError(f"{flags.records}: {len(defects)} defects, listed above")
    print(f"{flags.records}: whole and sound")
