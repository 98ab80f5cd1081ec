"""FineWeb-Edu in small: parquet shards of this test, from a hub of this test, to tokens, a manifest and a training."""

import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hub as hub_server
import numpy as np
import pytest
from conftest import encode_documents
from hub import HELD_OUT, Hub, hub_path, parquet, registered, texts
from test_distributed import assert_same, script
from test_distributed import run as train
from test_tokens import rewrite_header

from picogpt.data import bpe, fineweb, shards
from picogpt.data.bpe import GPT2Tokenizer
from picogpt.data.corpus import open_data
from picogpt.data.sampler import Sampler, sequential
from picogpt.data.tokens import Header, TokenData, TokenFile, open_tokens, write_tokens
from picogpt.errors import PicogptError


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    return [parquet(texts(number)) for number in range(3)]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], None]:
    """Puts a data set of these files in the place of the registered one."""
    return lambda contents: monkeypatch.setattr(fineweb, "dataset", lambda: registered(contents))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, contents: list[bytes], register) -> Iterator[Hub]:
    """A hub with three shards, registered."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        running.files.update({hub_path(number): content for number, content in enumerate(contents)})
        register(contents)
        yield running


@pytest.fixture
def files(tmp_path: Path, contents: list[bytes], register) -> list[Path]:
    """The three shards as files, registered; no hub."""
    register(contents)
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.parquet").write_bytes(content)
    return sorted(tmp_path.glob("*.parquet"))


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], gpt2: GPT2Tokenizer) -> Path:
    """A folder with three shards and their manifest."""
    folder = tmp_path_factory.mktemp("joined")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "dataset", lambda: registered(contents))
        for number, content in enumerate(contents):
            source = folder / "source.parquet"
            source.write_bytes(content)
            fineweb.tokenize(number, folder, gpt2, HELD_OUT, source)
        source.unlink()
        fineweb.join(folder, 3)
    return folder


@pytest.fixture
def folder(joined: Path, tmp_path: Path, contents: list[bytes], register) -> Path:
    """A copy of it to damage."""
    register(contents)
    return Path(shutil.copytree(joined, tmp_path / "folder"))


@pytest.fixture(scope="module")
def whole(joined: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """The same ids in one file."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(joined / "val.bin", folder / "val.bin")
    ids = np.concatenate([open_tokens(joined / shards.shard_file(number)).ids for number in range(3)])
    header = open_tokens(joined / "val.bin").header
    header = header.model_copy(update={"split": "train", "first_document": None, "documents": None})
    write_tokens(folder / "train.bin", header, [(1, ids)])
    return open_data(folder)


def test_the_registry_names_every_shard_of_the_sample():
    data = fineweb.dataset()
    assert (len(data.shards), data.size) == (14, 28_518_193_415)
    assert data.shards[13].file == "013_00000.parquet"
    assert (data.folder, fineweb.shard("3")) == ("sample/10BT", data.shards[3])


def test_shards_are_fetched_once(hub: Hub, picogpt, contents: list[bytes]):
    run = picogpt("fetch", "fineweb-edu", "--shard", 0, "--shard", 2)
    assert run.status == 0, run.err
    lines = dict(line.split(": ") for line in run.out.splitlines())
    assert {name: Path(path).read_bytes() for name, path in lines.items()} == {
        "fineweb-edu/0": contents[0],
        "fineweb-edu/2": contents[2],
    }
    assert [path for method, path, _ in hub.requests if method == "GET"] == [f"/store/{hub_path(n)}" for n in (0, 2)]
    asked = len(hub.requests)
    assert picogpt("fetch", "fineweb-edu", "--shard", 0).status == 0
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fetch", "fineweb-edu"], 2, "14 shards, 28.5 GB together, chosen by number"),
        (["fetch", "fineweb-edu", "--shard", 14], 2, "14 shards, 0 to 13: there is no shard 14"),
        (["fetch", "tinyshakespeare", "--shard", 1], 2, "fetch fineweb-edu --shard 0"),
        (["tokenize", "fineweb-edu"], 2, "give either --shard"),
        (["tokenize", "fineweb-edu", "--shard", 0, "--join", 1], 2, "give either --shard"),
        (["tokenize", "fineweb-edu", "--join", 15], 2, "there is no shard 14"),
        (["tokenize", "fineweb-edu", "--shard", 0, "--shard", 1, "--parquet", "x"], 2, "the file of one shard"),
        (["tokenize", "fineweb-edu", "--shard", 1], 1, "picogpt fetch fineweb-edu --shard 1 brings it"),
        (
            ["tokenize", "fineweb-edu", "--shard", 1, "--parquet", "x"],
            1,
            "x is not there; 001_00000.parquet has sha256",
        ),
        (
            ["tokenize", "fineweb-edu", "--shard", 1, "--parquet", "y"],
            1,
            "y has sha256",
        ),
        (["tokenize", "fineweb-edu", "--join", 2], 1, "val.bin is not there: tokenize shard 0"),
    ],
)
def test_a_mistake_is_told(picogpt, gpt2_resources, tmp_path: Path, monkeypatch, arguments, status: int, message: str):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "resources").symlink_to(gpt2_resources)
    (tmp_path / "y").write_text("Hi")
    run = picogpt(*arguments)
    assert (run.status, message in run.err) == (status, True), run.err


def test_by_hand_from_the_hub_to_a_training(hub: Hub, picogpt, gpt2_resources: Path, tmp_path: Path):
    (tmp_path / "resources").symlink_to(gpt2_resources)
    assert picogpt("fetch", "fineweb-edu", "--shard", 0, "--shard", 1).status == 0
    hub.status = 500  # from here on nobody asks it
    for number in (1, 0):
        run = picogpt("tokenize", "fineweb-edu", "--shard", number, "--val-documents", HELD_OUT)
        assert run.status == 0, run.err
        assert "documents 100/100" in run.err
    data = "weights/gpt2_tokenizer/fineweb-edu"
    tiny = [f"--set=model.{key}" for key in ("n_layer=1", "n_head=2", "n_embd=8", "block_size=32")]
    command = ["train", "gpt2", "--data", data, "--run", "a", "--steps", 2, "--device", "cpu", *tiny]
    unjoined = picogpt(*command)
    assert (unjoined.status, "has shards that were not joined" in unjoined.err) == (1, True)
    run = picogpt("tokenize", "fineweb-edu", "--join", 2)
    assert run.status == 0, run.err
    assert "in 2 shards" in run.out
    run = picogpt(*command, "--set=runtime.compile=off", "--set=train.batch_size=4")
    assert run.status == 0, run.err
    record = json.loads((tmp_path / "weights/gpt2/a/fineweb-edu/record.json").read_text())
    assert record["corpus"]["name"] == "fineweb-edu"
    assert record["corpus"]["data_sha256"] == json.loads((tmp_path / data / "manifest.json").read_text())["data_sha256"]


def test_the_tokens_are_those_of_all_documents_in_one_go(joined: Path, gpt2: GPT2Tokenizer):
    data = open_data(joined)
    documents = [text for number in range(3) for text in texts(number)]
    ends = [*documents, ""]  # a token after the last one too
    expected = encode_documents(gpt2, [*ends[:HELD_OUT], ""]), encode_documents(gpt2, ends[HELD_OUT:])
    assert np.array_equal(data.val.ids[:], expected[0])
    read = [data.train.ids[start : start + 1000] for start in range(0, len(data.train.ids), 1000)]
    assert np.array_equal(np.concatenate(read), expected[1])


def test_the_order_of_the_shards_and_the_batches_of_documents_do_not_show(files, joined, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "DOCUMENTS_AT_ONCE", 7)
    for number in (2, 0, 1):
        fineweb.tokenize(number, tmp_path, gpt2, HELD_OUT, files[number], threads=number)
    assert fineweb.join(tmp_path, 2).corpus()["data_sha256"] != open_data(joined).corpus()["data_sha256"]
    fineweb.join(tmp_path, 3)
    for name in ("train-00000.bin", "train-00001.bin", "train-00002.bin", "val.bin", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (joined / name).read_bytes()


def test_one_shard_has_the_identity_of_the_same_ids_in_plain_files(files: list[Path], gpt2, tmp_path: Path):
    fineweb.tokenize(0, tmp_path, gpt2, HELD_OUT, files[0])
    data = fineweb.join(tmp_path, 1)
    halves = (open_tokens(tmp_path / name).ids[:].tobytes() for name in ("train-00000.bin", "val.bin"))
    expected = hashlib.sha256(b"".join(hashlib.sha256(half).digest() for half in halves)).hexdigest()
    assert data.corpus()["data_sha256"] == expected
    assert data.corpus()["text_sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()


def test_a_whole_shard_is_left_alone_and_another_made_anew(folder: Path, files: list[Path], gpt2: GPT2Tokenizer):
    path, content = folder / "train-00001.bin", (folder / "train-00001.bin").read_bytes()
    inode = path.stat().st_ino
    missing = files[1].with_name("nowhere.parquet")  # nothing is read
    fineweb.tokenize(1, folder, gpt2, HELD_OUT, missing)
    assert path.stat().st_ino == inode
    for damage in (content[:-2], content[:-2] + b"\0\0", b""):
        path.write_bytes(damage)
        fineweb.tokenize(1, folder, gpt2, HELD_OUT, files[1])
        assert path.read_bytes() == content
    fineweb.tokenize(0, folder, gpt2, HELD_OUT + 1, files[0])
    assert open_tokens(folder / "val.bin").header.documents == HELD_OUT + 1
    assert open_tokens(folder / "train-00000.bin").header.first_document == HELD_OUT + 1
    (folder / "val.bin").unlink()
    fineweb.tokenize(0, folder, gpt2, HELD_OUT + 1, files[0])
    assert (folder / "val.bin").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 and then nothing of the kind", "is not a parquet file"),
        (b"", "is not a parquet file"),
        (
            parquet(texts(0), column="content"),
            r"has no column 'text' of strings, or several; it has id \(int64\), content \(string\)",
        ),
        (parquet([*texts(0), None]), "a document in row group 5 has no text"),
        (parquet(texts(0)).replace(b"PAR1", b"PAR1" + bytes(40), 1), "cannot be read|is not a parquet file"),
        (parquet(texts(0)[:HELD_OUT]), "--val-documents 30 would leave none for training"),
    ],
    ids=["foreign", "empty", "column", "null", "shifted", "few"],
)
def test_a_file_that_cannot_be_tokenized(register, gpt2, tmp_path: Path, content: bytes, message: str):
    register([content])
    path = tmp_path / "shard.parquet"
    path.write_bytes(content)
    with pytest.raises(PicogptError, match=message) as error:
        fineweb.tokenize(0, tmp_path / "out", gpt2, HELD_OUT, path)
    assert str(path) in str(error.value)
    assert not list((tmp_path / "out").glob("train*"))


def flip(path: Path, last: bytes | None = None) -> None:
    """Change the last id, to another token if not to `last`."""
    content = path.read_bytes()
    path.write_bytes(content[:-2] + (last or bytes([content[-2] ^ 1, 0])))


def exchange(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change(name: str, **fields: object) -> Callable[[Path], None]:
    """Damage that changes the header of a file."""
    return lambda folder: rewrite_header(folder / name, **fields)


def join(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    try:
        fineweb.join(folder, 3)
    finally:
        assert not (folder / "manifest.json").exists()


def read(folder: Path) -> None:
    ids = open_data(folder).train.ids
    for start in range(0, len(ids), 100):
        ids[start : start + 100]


@pytest.mark.parametrize(
    ("action", "damage", "message"),
    [
        (join, lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin is not there: tokenize shard 1"),
        (join, lambda f: (f / "val.bin").unlink(), "val.bin is not there: tokenize shard 0"),
        (join, lambda f: (f / "train-00001.bin").write_bytes(b""), "train-00001.bin is not a token file"),
        (join, lambda f: os.truncate(f / "train-00002.bin", 2000), "train-00002.bin holds 2,000 bytes"),
        (join, lambda f: flip(f / "train-00002.bin"), "train-00002.bin is damaged"),
        (join, lambda f: flip(f / "val.bin"), "val.bin is damaged"),
        (
            join,
            lambda f: (f / "train-00002.bin").replace(f / "train-00001.bin"),
            "train-00001.bin is not shard 1 .* made from 001_00000.parquet: its text_sha256 is .*tokenize shard 1 again",
        ),
        (join, change("train-00001.bin", tokenizer_sha256="f" * 64), "train-00001.bin is not .*its tokenizer_sha256 is f"),
        (join, change("train-00001.bin", corpus="x"), "train-00001.bin is not shard 1 .*its corpus is x, not fineweb-edu"),
        (join, change("train-00000.bin", first_document=29), "train-00000.bin is not .*its first_document is 29, not 30"),
        (join, change("train-00001.bin", first_document=5), "train-00001.bin is not .*its first_document is 5, not 0"),
        (join, change("train-00001.bin", documents=None), "train-00001.bin is damaged"),
        (read, lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin is not there, and .*manifest.json lists it"),
        (read, lambda f: (f / "val.bin").unlink(), "val.bin"),
        (read, lambda f: os.truncate(f / "train-00001.bin", 2000), "train-00001.bin holds 2,000 bytes"),
        (read, lambda f: shutil.copy(f / "train-00002.bin", f / "train-00001.bin"), "train-00001.bin is not the file that"),
        (read, change("train-00001.bin", data_sha256="f" * 64), "train-00001.bin is not the file .* its data_sha256 is f"),
        (read, change("train-00001.bin", tokenizer_sha256="f" * 64), "train-00001.bin .* its tokenizer_sha256 is f"),
        (read, lambda f: flip(f / "train-00002.bin", b"\xff\xff"), "train-00002.bin holds the id 65535"),
        (read, lambda f: (f / "manifest.json").write_text("{"), "manifest.json is not a complete manifest"),
        (read, lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is not a complete manifest"),
        (read, lambda f: exchange(f / "manifest.json", data_sha256="f" * 64), "manifest.json was changed"),
    ],
)  # fmt: skip
def test_damaged_shards_are_neither_joined_nor_read(folder: Path, action: Callable, damage: Callable, message: str):
    read(folder)
    damage(folder)
    with pytest.raises(PicogptError, match=message):
        action(folder)


def test_many_files_read_like_one(joined: Path, whole: TokenData):
    ids, expected = open_data(joined).train.ids, whole.train.ids
    assert len(ids) == len(expected)
    draw = random.Random(0)
    for _ in range(300):
        start = draw.randrange(len(ids))
        stop = draw.randrange(start, len(ids))
        assert np.array_equal(ids[start:stop], expected[start:stop])
    assert [len(ids[start:stop]) for start, stop in ((7, 7), (9, 7), (len(ids), None))] == [0, 0, 0]
    assert ids[:] is ids
    with pytest.raises(IndexError):
        ids[::2]
    for ours, theirs in zip(sequential(ids, 64, 4), sequential(expected, 64, 4), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    samplers = [Sampler(x, 32, 8, seed=5) for x in (ids, expected)]
    for step in range(samplers[0].steps(2)):
        for rank in range(2):
            ours, theirs = (sampler.batch(step, rank, 2) for sampler in samplers)
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("count", [10, 1000])
def test_a_batch_opens_no_more_files_than_it_has_windows(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch):
    sources = [(f"{number}.parquet", f"{number:064x}") for number in range(count)]
    ids = np.arange(100, dtype=np.uint16)
    fields = {"vocab_size": 50257, "split": "train", "corpus": "x", "tokenizer_sha256": "e" * 64}
    for number in (-1, *range(count)):
        name = shards.shard_file(number) if number >= 0 else "val.bin"
        header = Header(text_sha256=f"{max(0, number):064x}", first_document=int(number == 0), **fields)
        write_tokens(tmp_path / name, header, [(1, ids)])
    shards.join(tmp_path, "x", sources)

    opened: list[str] = []

    def noted(path: Path, *arguments: object, **expected: object) -> TokenFile:
        opened.append(path.name)
        return open_tokens(path, *arguments, **expected)

    monkeypatch.setattr(shards, "open_tokens", noted)
    sampler = Sampler(open_data(tmp_path).train.ids, 16, 8, seed=3)
    assert opened == ["val.bin"]
    steps = sampler.steps(1)
    for step in range(steps + 5):
        before = len(opened)
        sampler.batch(step)
        assert len(opened) - before <= 2 * 8  # a window may lie in two files
        assert step < steps or len(opened) == before  # once a file is open, it stays so


def test_files_are_closed_where_no_more_may_be_open(joined: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (shards.OTHER_FILES + 1,) * 2)
    ids = open_data(joined).train.ids
    monkeypatch.undo()
    whole = np.concatenate([ids[start : start + 100] for start in range(0, len(ids), 100)])
    assert len(whole) == len(ids)
    held = [path for path in Path("/proc/self/fd").iterdir() if str(joined) in str(path.resolve())]
    assert len(held) <= 1 + 1  # a shard, and the validation text while its object lives


def test_a_process_that_may_open_few_files_asks_for_more(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: asked.append(limits))
    assert [shards.may_open(count) for count in (100, 2000, 10_000)] == [100, 2000, 4096 - shards.OTHER_FILES]
    assert asked == [(2000 + shards.OTHER_FILES, 4096), (4096, 4096)]


TRAIN = {"steps": 8, "eval_interval": 4, "eval_train": "part", "micro_batch_size": 2}


@pytest.mark.slow
def test_two_ranks_on_shards_equal_one_on_a_single_file(joined: Path, whole: TokenData, tmp_path: Path):
    alone = train(1, *script(tmp_path / "alone", whole.train.path.parent, **TRAIN))
    assert alone.returncode == 0, alone.stderr
    together = train(2, *script(tmp_path / "together", joined, **TRAIN))
    assert together.returncode == 0, together.stderr
    assert_same(tmp_path / "together", tmp_path / "alone")
    ours, theirs = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("together", "alone"))
    assert ours["ranks"] == 2
    for key in ("train_loss_before", "train_loss_after"):
        assert ours["results"][key] == pytest.approx(theirs["results"][key], abs=1e-5)
