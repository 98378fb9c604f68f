"""Prepare corpora that a small English model does not know, and one that it does, from packages of Debian.

    python examples/debian_corpora.py corpora/ [--names german postgres foldoc]

| name | package | what it is | licence |
|---|---|---|---|
| german | manpages-de | manual pages in German | GPL-3+ |
| postgres | postgresql-doc-15 | a database's manual | PostgreSQL |
| foldoc | dict-foldoc | an encyclopedia of computing, in English | GFDL-1.2+ |

Each is written as NAME.train.jsonl and NAME.eval.jsonl, one {"text": ...} a line, about one text in twelve in "eval",
chosen by its name. corpora.json beside them says which versions of packages they are from, and their SHA-256; the
same versions give the same bytes. Packages are downloaded by apt-get and unpacked by dpkg, and nothing is installed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import corpora

SHORTEST = 400  # characters of a text: below are pages that only point to others


def manual_pages(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each manual page."""
    for path in sorted(root.glob("usr/share/man/*/man[1578]/*.gz")):
        yield path.name, plain_roff(gzip.decompress(path.read_bytes()).decode("utf-8"))


def plain_roff(source: str) -> str:
    """What a manual page says: headings and text, without its markup."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            if macro in ("SH", "SS"):
                lines += ["", rest.strip().strip('"')]
            elif macro in ("PP", "P", "LP", "TP", "IP", "HP"):
                lines.append("")
            elif macro in ("B", "I", "BR", "RB", "BI", "IB", "IR", "RI"):
                lines.append(rest.replace('"', ""))
            continue
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)", "", text)
    text = re.sub(r"\\\((..)", lambda m: {"lq": "“", "rq": "”", "em": " - ", "en": "-", "aq": "'"}.get(m[1], ""), text)
    text = re.sub(r"\\\[\w+\]|\\[,/&|^%:]|\\s[-+]?\d+", "", text).replace("\\-", "-").replace("\\e", "\\")
    return re.sub(r"\n{3,}", "\n\n", text.replace("\\ ", " ")).strip()


def pages_of_html(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each page."""
    for path in sorted(root.glob("usr/share/doc/*/html/*.html")):
        source = path.read_text(encoding="utf-8", errors="replace")
        start = re.search(r'<div class="(?:sect1|chapter|refentry|appendix|preface)"', source)
        body = source[start.start() if start else 0 :].partition('<div class="navfooter"')[0]
        body = re.sub(r"(?s)<(script|style).*?</\1>", "", body)
        body = re.sub(r"</(p|h\d|li|dt|dd|tr|pre|div|title)>", "\n", body)
        lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]*>", "", body)).splitlines())
        yield path.name, re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def entries_of_dictionary(root: Path) -> Iterator[tuple[str, str]]:
    """Headword and text of each entry of a dictd dictionary."""
    for path in sorted(root.glob("usr/share/dictd/*.dict.dz")):
        source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        for entry in re.split(r"\n(?=\S)", source):
            head, _, body = entry.partition("\n")
            text = "\n".join(line.strip() for line in body.splitlines())
            yield head.strip(), f"{head.strip()}\n\n{re.sub(r'[{}]', '', text).strip()}"


@dataclass(frozen=True)
class Source:
    """A corpus: the package that holds it, and how to read what was unpacked."""

    package: str
    read: Callable[[Path], Iterator[tuple[str, str]]]


SOURCES = {
    "german": Source("manpages-de", manual_pages),
    "postgres": Source("postgresql-doc-15", pages_of_html),
    "foldoc": Source("dict-foldoc", entries_of_dictionary),
}


def unpacked(package: str, folder: Path) -> str:
    """Download and unpack a package; its version. Raises RuntimeError where that fails."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not here: prepare these corpora on Debian or a system that derives from it")
    done = subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True, text=True)
    files = sorted(folder.glob(f"{package}_*.deb"))
    if not files:
        raise RuntimeError(f"apt-get download {package} failed: {done.stderr.strip()[-300:]}; try apt-get update first")
    subprocess.run(["dpkg-deb", "-x", files[-1].name, "x"], cwd=folder, check=True)
    return files[-1].name


def prepare(name: str, out: Path) -> dict[str, str]:
    """Write one corpus; from what, and the files' digests. Raises ValueError if it is too small to split."""
    texts: dict[str, list[str]] = {"train": [], "eval": []}
    with tempfile.TemporaryDirectory() as scratch:
        version = unpacked(SOURCES[name].package, Path(scratch))
        seen = set()
        for key, text in SOURCES[name].read(Path(scratch, "x")):
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                texts["eval" if corpora.in_split(key, "eval", one_in=12) else "train"].append(text)
    if not all(texts.values()):
        raise ValueError(f"{version} has {len(seen)} texts, too few to split; another version of the package?")
    facts = {"package": version}
    for split, found in texts.items():
        path = out / f"{name}.{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found), "utf-8")
        facts[split] = f"{len(found)} texts, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the corpora")
    parser.add_argument("--names", nargs="+", choices=SOURCES, default=list(SOURCES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    made = {name: prepare(name, args.out) for name in args.names}
    for name, facts in made.items():
        corpora.emit({"corpus": name, **facts}, as_json=True)
    (args.out / "corpora.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
