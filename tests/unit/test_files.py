import os
import subprocess
import sys
from pathlib import Path

import pytest

from picogpt.errors import PicogptError
from picogpt.files import atomic_write, exclusive_lock, read_text, write_text


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def fail_halfway(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        fail_halfway(path)
    assert path.read_text() == "old"
    # A limit on the size of files fails a write in the middle, as a full disk does.
    run = python(f"""
import resource
from picogpt.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with atomic_write({str(path)!r}) as file:
    file.write(b"x" * 100_000)
""")
    assert f"cannot write {path}: File too large" in run.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PicogptError, match=r"file/a\.txt"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_text_is_utf8_with_unix_line_ends_and_others_may_read_it(tmp_path: Path):
    previous = os.umask(0o027)
    write_text(tmp_path / "a", "é\n")
    os.umask(previous)
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    (tmp_path / "b").write_bytes(b"ok\xff")
    with pytest.raises(PicogptError, match="not UTF-8 text: byte 2 is 0xff"):
        read_text(tmp_path / "b")


def test_a_folder_is_held_by_one_process(tmp_path: Path):
    lock = (
        f"from picogpt.files import exclusive_lock\nwith exclusive_lock({str(tmp_path)!r}, 'training'): print('got it')"
    )
    with exclusive_lock(tmp_path, "training"):
        assert f"another process is training in {tmp_path}" in python(lock).stderr
    assert python(lock).stdout == "got it\n"
