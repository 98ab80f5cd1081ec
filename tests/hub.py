"""A small hub of the Hugging Face shape: redirects to a store, ETags, ranges; what can go wrong; shards of text for it."""

from __future__ import annotations

import hashlib
import http.server
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import serving

from picogpt.data import fineweb

HELD_OUT = 30
"""Documents of the first shard that are for validation."""
REVISION = "0123456789" * 4
WORDS = ["the", "river", "carries", "sand;", "a", "delta", "grows", "é", "每年", "<|endoftext|>", "\n\n"]


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


def handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

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


def parquet(documents: list[str | None], column: str = "text") -> bytes:
    """A parquet file of several row groups, with a column that nobody needs beside the text."""
    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(documents)), column: documents}), out, row_group_size=17)
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
