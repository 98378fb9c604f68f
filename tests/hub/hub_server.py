"""A server on this machine that speaks the Hub's protocol, as far as pushing and loading models goes.

Repositories, branches, commits and large files (LFS) are held in memory. Written from what huggingface_hub asks for and
from the LFS batch protocol; what it is not asked for here is missing.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".bin")
# who a token belongs to, and whether it may write
TOKENS = {"hf_mine": ("me", True), "hf_reading": ("me", False)}


@dataclass
class Repo:
    """Commits are mappings of paths to contents; `branches` name the last of each."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        told = f"{len(self.commits)} {branch} {sorted(files)}"
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def oid(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """Attributes:
    stored: large files by their sha256. uploads: these hashes, in the order that they came in whole.
    cut: a name: uploads of what is to be called so are cut in the middle. asked: methods and paths.
    part: larger files come in parts of so many bytes. parts: these, until a file is completed.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.asked: list[str] = []
        self.cut: str | None = None
        self.part = 1 << 30
        self.parts: dict[tuple[str, int], bytes] = {}
        # sizes of announced files, by name: what tells which of them an upload is
        self.announced: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Refused(Exception):
    def __init__(self, status: int, code: str = "", body: Any = None):
        super().__init__(status, code)
        self.status, self.code, self.body = status, code, body


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer(READ)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(WRITE)

    def do_PUT(self) -> None:
        self._answer({r"/lfs/(?P<oid>\w+)(?:/(?P<number>\d+))?": Answers.upload})

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, routes: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        try:
            for pattern, answer in routes.items():
                if found := re.fullmatch(pattern, path):
                    given = {name: unquote(text) for name, text in found.groupdict().items() if text is not None}
                    answer(self, **given)
                    return
            raise Refused(404)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(json.dumps(refused.body or {"error": refused.code}).encode(), refused.status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # ---- who asks, and for what

    def _user(self) -> tuple[str, bool] | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _writer(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Refused(401)
        if user != (owner, True):
            raise Refused(403)

    def _repo(self, repo: str) -> Repo:
        found = self.server.repos.get(repo)
        if found is None or (found.private and (self._user() or ("",))[0] != repo.split("/")[0]):
            raise Refused(401 if self._user() is None else 404, "RepoNotFound")
        return found

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        held = self._repo(repo)
        oid = held.oid(revision)
        if oid is None:
            raise Refused(404, "RevisionNotFound")
        return oid, held.commits[oid]

    # ---- reading

    def info(self, repo: str, revision: str = "main") -> None:
        oid, files = self._at(repo, revision)
        found = {"id": repo, "sha": oid, "private": self.server.repos[repo].private, "tags": []}
        self._json({**found, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self._at(repo, revision)
        self._json([{"type": "file", "path": path, **described(path, held)} for path, held in files.items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        oid, files = self._at(repo, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        # the Hub itself sends to another host for large files, which has no such headers
        held = described(path, files[path])
        etag = held["lfs"]["oid"] if "lfs" in held else held["oid"]
        told = {
            "X-Repo-Commit": oid,
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(held["size"]),
        }
        self._send(files[path], headers=told)

    # ---- writing

    def create(self) -> None:
        asked, user = json.loads(self._body()), self._user()
        if user is None:
            raise Refused(401)
        owner = asked.get("organization") or user[0]
        self._writer(owner)
        name, url = f"{owner}/{asked['name']}", f"{self.server.url}/{owner}/{asked['name']}"
        if name in self.server.repos:
            raise Refused(409, body={"url": url})
        made = self.server.repos[name] = Repo(asked.get("private", asked.get("visibility") == "private"))
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": url, "name": name})

    def branch(self, repo: str, revision: str) -> None:
        self._body()
        self._writer(repo.split("/")[0])
        held = self._repo(repo)
        if revision in held.branches:
            raise Refused(409)
        held.branches[revision] = held.branches["main"]
        self._json({})

    def validate(self) -> None:
        data = yaml.safe_load(json.loads(self._body())["content"].split("---")[1])
        wrong = [
            name for name in ("base_model", "license") if "/" in str(data.get(name, "")).strip("/").replace("/", "", 1)
        ]
        if wrong:
            raise Refused(400, body={"errors": [{"message": f"{name} is none"} for name in wrong]})
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self._body())["files"]
        self._writer(repo.split("/")[0])
        _, files = self._at(repo, revision)
        self.server.announced |= {each["path"]: each["size"] for each in asked}
        found = []
        for each in asked:
            path = each["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                held = described(path, files[path])
                found[-1]["oid"] = held["lfs"]["oid"] if "lfs" in held else held["oid"]
        self._json({"files": found})

    def batch(self, repo: str) -> None:
        asked = json.loads(self._body())
        self._writer(repo.split("/")[0])
        found = []
        for each in asked["objects"]:
            missing = each["oid"] not in self.server.stored
            upload: dict[str, Any] = {"href": f"{self.server.url}/lfs/{each['oid']}"}
            if each["size"] > self.server.part:
                parts = range(1, 1 + -(-each["size"] // self.server.part))
                upload["header"] = {"chunk_size": str(self.server.part)}
                upload["header"] |= {f"{part:05}": f"{upload['href']}/{part}" for part in parts}
            found.append({**each, **({"actions": {"upload": upload}} if missing else {})})
        self._json({"transfer": "basic", "objects": found})

    def upload(self, oid: str, number: str = "") -> None:
        size = int(self.headers["Content-Length"])
        if number:
            self.server.parts[oid, int(number)] = part = self.rfile.read(size)
            self._send(b"", headers={"ETag": hashlib.sha256(part).hexdigest()})
            return
        if self.server.cut is not None and size == self.server.announced[self.server.cut]:
            self.rfile.read(size // 2)
            self.connection.close()
            self.close_connection = True
            return
        self._keep(oid, self.rfile.read(size))

    def complete(self, oid: str) -> None:
        named = json.loads(self._body())
        parts = [self.server.parts.pop((oid, number)) for number in range(1, 1 + len(named["parts"]))]
        assert [part["etag"] for part in named["parts"]] == [hashlib.sha256(part).hexdigest() for part in parts]
        self._keep(oid, b"".join(parts))

    def _keep(self, oid: str, data: bytes) -> None:
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.stored[oid] = data
        self.server.uploads.append(oid)
        self._send(b"")

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        self._writer(repo.split("/")[0])
        held = self._repo(repo)
        if revision not in held.branches:
            raise Refused(404, "RevisionNotFound")
        files = dict(held.commits[held.branches[revision]])
        assert lines[0]["key"] == "header"
        assert lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Refused(400, body={"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, body={"error": line["key"]})
        oid = held.commit(revision, files)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})


def described(path: str, held: bytes) -> dict[str, Any]:
    """What git, or LFS, calls a file's contents."""
    blob = {"oid": hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest(), "size": len(held)}
    if not path.endswith(LARGE):
        return blob
    return {**blob, "lfs": {"oid": hashlib.sha256(held).hexdigest(), "size": len(held), "pointerSize": 134}}


NAME, AT = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
READ = {
    rf"/api/models/{NAME}": Answers.info,
    rf"/api/models/{NAME}/revision/{AT}": Answers.info,
    rf"/api/models/{NAME}/tree/{AT}": Answers.tree,
    rf"/{NAME}/resolve/{AT}/(?P<path>.+)": Answers.resolve,
}
WRITE = {
    r"/api/repos/create": Answers.create,
    r"/api/validate-yaml": Answers.validate,
    rf"/api/models/{NAME}/branch/{AT}": Answers.branch,
    rf"/api/models/{NAME}/preupload/{AT}": Answers.preupload,
    rf"/api/models/{NAME}/commit/{AT}": Answers.commit,
    rf"/{NAME}\.git/info/lfs/objects/batch": Answers.batch,
    r"/lfs/(?P<oid>\w+)": Answers.complete,
}
