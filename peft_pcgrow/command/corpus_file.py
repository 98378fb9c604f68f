"""Files of text as a corpus."""

import json
from pathlib import Path

SUFFIXES = (".jsonl", ".txt")
LINE = "each line is a string, or an object with a field text"


def read_corpus_file(path: Path) -> list[str]:
    """The texts of a file.

    `.jsonl`: one text a line, a JSON string or an object with a field `text`. `.txt`: texts are apart by empty lines.

    Raises:
        ValueError: another suffix, no text, or a line that is none; its number is named.
        OSError: the file cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a corpus is a file {' or '.join(SUFFIXES)}, one text a line or paragraph")
    try:
        # no splitlines: a string in JSON may hold other ends of lines, such as U+2028, as they are
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it") from None
    if path.suffix == ".txt":
        texts = [part.strip() for part in "\n".join(line.rstrip() for line in lines).split("\n\n")]
    else:
        texts = [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    found = [text for text in texts if text]
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def _read_line(line: str, where: str) -> str:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): {LINE}") from None
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        fields = isinstance(item, dict) and "text" not in item
        given = f"the fields {', '.join(item)}" if fields else f"a text of type {type(text).__name__}"
        raise ValueError(f"{where} has {given}: {LINE}")
    return text
