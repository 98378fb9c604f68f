"""Pages that the package draws: that they stand alone, and what they say."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'<!--data-->"
# elements without an end
VOID = {"meta", "br", "line", "circle", "polyline"}
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node to read JavaScript")


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles; every element ends where it must."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert not self.open, f"never ended: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


def stands_alone(text: str) -> Parsed:
    """The page, which asks for nothing that is not in it and has no marker left."""
    page = Parsed(text)
    assert not re.search(r"https?:|//[\w.]+/|url\(|@import|\bimport\b|fetch\(|XMLHttp", text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object", "base"})
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert "<!--" not in text.replace("<!doctype", "")
    return page


def data_of(path: Path) -> dict:
    """What the script of a page draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found.group(1))


def assert_runs(path: Path) -> None:
    """The script of a page is JavaScript."""
    script = re.search(r"<script>(.*?)</script>", path.read_text(), re.DOTALL)
    assert script
    copy = path.with_suffix(".js")
    copy.write_text(script.group(1))
    done = subprocess.run(["node", "--check", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
