"""The command line of scripts that try many architectures, and where their table goes."""

import argparse
import logging
import warnings
from pathlib import Path

import corpora


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add what such scripts have in common, parse, and switch warnings off: tiny models cause many."""
    parser.add_argument("--table", type=Path, metavar="PATH", help="write the table to this file")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return args


def publish(table: str, path: Path | None) -> None:
    """To a file, or to standard error."""
    if path is not None:
        path.write_text(table, encoding="utf-8")
    else:
        corpora.note(table)
