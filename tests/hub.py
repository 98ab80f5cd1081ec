"""A small hub of the Hugging Face shape: redirects to a store, ETags, ranges; repositories to commit to; what can go wrong.

And shards of text for it.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from conftest import serving

from picogpt.data import fineweb

HELD_OUT = 30
"""Documents of the first shard that are for validation."""
REVISION = "0123456789" * 4
TOKEN, USER = "hf_a_token_that_may_write", "me"
"""Of the only user who may write, under this name."""
WORDS = ["the", "river", "carries", "sand;", "a", "delta", "grows", "é", "每年", "<|endoftext|>", "\n\n"]


@dataclass
class Repository:
    """A repository to which somebody commits."""

    private: bool = False
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    """Hashes; the first one is empty."""


@dataclass
class Hub:
    """What the hub has, and how it behaves."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    """By "repository/revision/file"."""
    status: int = 200
    """Of every answer about a file."""
    hang_up_after: list[int] = field(default_factory=list)
    """For each of the next downloads: close the connection after so many bytes."""
    claimed_hash: str | None = None
    """Named instead of the real one."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range) of each request."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files that arrived whole, by their hash."""
    fails: dict[str, int] = field(default_factory=dict)
    """Status with which requests are answered whose path has this in it; 0: the connection is closed."""
    loses_answers: bool = False
    """A commit is made, and the connection closed before the answer."""


def handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            if self.path.startswith("/api/"):
                return self.api()
            self.answer(body=True)

        def do_POST(self) -> None:
            self.api()

        def do_PUT(self) -> None:
            """A large file: kept if all of it arrives and it has the hash by which it was announced."""
            hub.requests.append((self.command, self.path, None))
            if hub.hang_up_after:
                self.rfile.read(hub.hang_up_after.pop(0))
                return self.hang_up()
            content = self.received()
            if hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/"):
                hub.stored[self.path.removeprefix("/lfs/")] = content
            self.reply({})

        def received(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
            return b"".join(chunks)

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(2)

        def reply(self, tree: dict[str, Any], status: int = 200, **headers: str) -> None:
            body = json.dumps(tree).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def api(self) -> None:
            """What creates a repository, describes it, and commits to it."""
            hub.requests.append((self.command, self.path, None))
            body = self.received()
            for part, status in hub.fails.items():
                if part in self.path:
                    return self.reply({"error": "no"}, status) if status else self.hang_up()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.reply({"error": "Invalid username or password."}, 401)
            if self.path == "/api/validate-yaml":
                return self.reply({}, 200 if header_of(json.loads(body)["content"]) else 400)
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            found = re.fullmatch(
                r"(?:/api/models)?/([^/]+/[^/.]+)(?:\.git)?(?:/(preupload|commit|info|revision)/.*)?", self.path
            )
            name, action = found.groups() if found else ("", "")
            repository = hub.repositories.get(name)
            if not repository or (repository.private and not name.startswith(f"{USER}/")):
                return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if self.command == "POST" and not name.startswith(f"{USER}/"):
                return self.reply({"error": "You don't have the rights"}, 403)
            prefix = f"{name}/main/"
            has = {path.removeprefix(prefix): text for path, text in hub.files.items() if path.startswith(prefix)}
            if action == "preupload":
                large = [
                    {**file, "uploadMode": "lfs" if file["size"] > 100_000 else "regular"}
                    for file in json.loads(body)["files"]
                ]
                oids = {path: git_hash(content) for path, content in has.items()}
                self.reply(
                    {"files": [{**file, "shouldIgnore": False, "oid": oids.get(file["path"])} for file in large]}
                )
            elif action == "info":
                self.reply(
                    {"transfer": "basic", "objects": [self.upload(each) for each in json.loads(body)["objects"]]}
                )
            elif action == "commit":
                self.commit(repository, prefix, [json.loads(line) for line in body.splitlines()])
            else:
                siblings = [{"rfilename": path} for path in has]
                self.reply(
                    {"id": name, "sha": repository.commits[-1], "private": repository.private, "siblings": siblings}
                )

        def create(self, wanted: dict[str, Any]) -> None:
            owner, name = wanted.get("organization") or USER, wanted["name"]
            if owner != USER:
                return self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
            status = 409 if f"{owner}/{name}" in hub.repositories else 200
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            hub.repositories.setdefault(f"{owner}/{name}", Repository(private))
            self.reply({"url": f"{hub.address}/{owner}/{name}"}, status)

        def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
            to = {"upload": {"href": f"{hub.address}/lfs/{wanted['oid']}"}}
            return wanted if wanted["oid"] in hub.stored else {**wanted, "actions": to}

        def commit(self, repository: Repository, prefix: str, lines: list[dict[str, Any]]) -> None:
            values = [(line["key"], line["value"]) for line in lines[1:]]
            if any(key == "lfsFile" and value["oid"] not in hub.stored for key, value in values):
                return self.reply({"error": "a large file is not there"}, 400)
            for key, value in values:
                whole = hub.stored[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
                hub.files[prefix + value["path"]] = whole
            repository.commits.append(f"{len(repository.commits):040}")
            if hub.loses_answers:
                return self.hang_up()
            oid = repository.commits[-1]
            self.reply({"commitUrl": f"{hub.address}/{prefix.removesuffix('/main/')}/commit/{oid}", "commitOid": oid})

        def answer(self, body: bool) -> None:
            wanted = self.headers.get("Range")
            hub.requests.append((self.command, self.path, wanted))
            if self.path.startswith("/store/"):
                return self.store(hub.files[self.path.removeprefix("/store/")], wanted, body)
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            content = hub.files.get(f"{repository}/{revision}/{name}")
            status = hub.status if hub.status != 200 else 302 if content is not None else 404
            self.send_response(status)
            if status == 302 and content is not None:
                digest = hub.claimed_hash or hashlib.sha256(content).hexdigest()
                self.send_header(
                    "Location", f"{hub.address.replace('127.0.0.1', 'localhost')}/store/{repository}/{revision}/{name}"
                )
                self.send_header("X-Repo-Commit", revision)
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(content)))
            elif status == 401:
                self.send_header("X-Error-Message", "Invalid username or password.")
            elif status == 404:
                self.send_header("X-Error-Code", "EntryNotFound" if hub.files else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def store(self, content: bytes, wanted: str | None, body: bool) -> None:
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hub.claimed_hash or hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                end = start + hub.hang_up_after.pop(0) if hub.hang_up_after else len(content)
                self.wfile.write(content[start:end])
                self.wfile.flush()
                if end < len(content):
                    self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


def header_of(card: str) -> dict[str, Any]:
    """The YAML header of a model card; empty where it has none."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def git_hash(content: bytes) -> str:
    """The name that git gives a file; the hub uses the SHA-256 of a large one."""
    if len(content) > 100_000:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on this machine."""
    hub = Hub("")
    with serving(handler(hub)) as hub.address:
        yield hub


def texts(number: int) -> list[str]:
    """The documents of a shard: the same each time; one of them is empty."""
    draw = random.Random(number)
    return ["", *(" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(99))]


def parquet(documents: list[str | None], column: str = "text", other: str = "id") -> bytes:
    """A parquet file of several row groups, with a column that nobody needs beside the text."""
    out = io.BytesIO()
    columns = [pa.array(range(len(documents))), pa.array(documents)]
    pq.write_table(pa.table(columns, names=[other, column]), out, row_group_size=17)
    return out.getvalue()


def registered(contents: list[bytes]) -> fineweb.Dataset:
    files = [
        {"file": f"{number:03}_00000.parquet", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for number, content in enumerate(contents)
    ]
    return fineweb.Dataset.model_validate(
        {
            "title": "pages", "licence": "none", "repository": "HuggingFaceFW/fineweb-edu", "revision": REVISION,
            "folder": "sample/10BT", "shards": files,
        }
    )  # fmt: skip


def hub_path(number: int) -> str:
    return f"datasets/HuggingFaceFW/fineweb-edu/{REVISION}/sample/10BT/{number:03}_00000.parquet"
