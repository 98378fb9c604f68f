"""Which operations hold on which architecture: every mixture-of-experts causal LM of transformers, in miniature.

What each operation checks, and against what, is in `operations.py`.

    python examples/conformance.py                                     # all of them; the table on standard error
    python examples/conformance.py --table examples/conformance.md
    python examples/conformance.py --architectures zaya gpt_oss --operations sweep map --json

An operation fails with one line: what was raised, or what was measured. A note beside a success says what the base
model itself cannot do.
"""

import argparse
import time
from collections.abc import Iterable
from typing import Any

import torch
import transformers

import architectures
import corpora
import tables
from checks import one_line
from operations import OPERATIONS


def conform(name: str, operation: str) -> dict[str, Any]:
    """One row: whether an operation holds for an architecture, and why not, or what is to be said about it."""
    torch.manual_seed(0)
    row = {"architecture": name, "operation": operation}
    try:
        return {**row, "ok": True, "reason": OPERATIONS[operation](name)}
    except Exception as error:
        return {**row, "ok": False, "reason": one_line(error)}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: architecture by operation, and below it why what fails fails."""
    rows = list(rows)
    names, operations = (list(dict.fromkeys(row[key] for row in rows)) for key in ("architecture", "operation"))
    cells = {(row["architecture"], row["operation"]): row for row in rows}
    green = [name for name in names if all(cells[name, o]["ok"] for o in operations)]
    lines = [
        "# Conformance",
        "",
        f"Every mixture-of-experts causal LM that transformers {transformers.__version__} knows, in miniature: "
        f"{len(green)} of {len(names)} pass all operations. Written by "
        "[`conformance.py`](conformance.py), and [`operations.py`](operations.py) says what each operation checks.",
        "",
        "| architecture | " + " | ".join(operations) + " |",
        "|---|" + "---|" * len(operations),
    ]
    for name in names:
        mine = [cells[name, operation] for operation in operations]
        marks = [("yes\\*" if row["reason"] else "yes") if row["ok"] else "**no**" for row in mine]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    said: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["reason"]:
            said.setdefault(row["reason"], {}).setdefault(row["architecture"], []).append(row["operation"])
    if said:
        lines += ["", "What fails, and what is to be said of what does not (\\*):", ""]
    for reason, who in said.items():
        befallen: dict[str, list[str]] = {}
        for name, of in who.items():
            befallen.setdefault("all" if of == operations else ", ".join(of), []).append(name)
        listed = "; ".join(f"{', '.join(names)} ({of})" for of, names in befallen.items())
        lines.append(f"- {listed}: {reason}")
    return "\n".join(lines) + "\n"


def main() -> None:
    every = list(architectures.moe_architectures())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=every, choices=every, metavar="NAME")
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    args = tables.parse(parser)
    rows = []
    for name in args.architectures:
        started = time.perf_counter()
        mine = [conform(name, operation) for operation in args.operations]
        for row in mine:
            corpora.emit(row, args.json)
        failed = [row["operation"] for row in mine if not row["ok"]]
        result = f"{', '.join(failed)} fail" if failed else "all pass"
        corpora.note(f"{name}: {result}, {time.perf_counter() - started:.1f} s")
        rows += mine
    tables.publish(table(rows), args.table)


if __name__ == "__main__":
    main()
