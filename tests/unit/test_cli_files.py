# SPDX-License-Identifier: Apache-2.0
"""A file is there whole or not at all, whatever ends the process that writes it."""

from __future__ import annotations

import errno
import io
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from openkcm.cli import files
from openkcm.errors import InvalidInput


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=["unnamed", "named"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the way for file systems without O_TMPFILE."""
    if request.param == "named":
        monkeypatch.setattr("openkcm.cli.files.os.path.isdir", lambda _: False)


@pytest.mark.usefixtures("either_way")
class TestWriting:
    def test_a_new_file_is_its_owners_only(self, tmp_path: Path) -> None:
        with files.writing(str(tmp_path / "new")) as target:
            target.write(b"all of it")
            assert not (tmp_path / "new").exists()
        assert (tmp_path / "new").read_bytes() == b"all of it"
        assert mode(tmp_path / "new") == 0o600
        assert os.listdir(tmp_path) == ["new"]

    def test_it_takes_the_permissions_of_another(self, tmp_path: Path) -> None:
        (tmp_path / "old").write_bytes(b"")
        (tmp_path / "old").chmod(0o640)
        with files.writing(str(tmp_path / "new"), like=str(tmp_path / "old")):
            pass
        assert mode(tmp_path / "new") == 0o640

    def test_replacing_never_opens_a_closed_file(self, tmp_path: Path) -> None:
        for name, bits in (("old", 0o644), ("new", 0o600)):
            (tmp_path / name).write_bytes(b"")
            (tmp_path / name).chmod(bits)
        with files.writing(str(tmp_path / "new"), force=True, like=str(tmp_path / "old")):
            pass
        assert mode(tmp_path / "new") == 0o600

    def test_what_is_there_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "there").write_bytes(b"precious")
        with pytest.raises(files.TargetExists), files.writing(str(tmp_path / "there")):
            pytest.fail("it must not begin")
        assert (tmp_path / "there").read_bytes() == b"precious"

    def test_a_name_taken_in_the_meantime_is_not_replaced(self, tmp_path: Path) -> None:
        writing = files.writing(str(tmp_path / "raced"))
        writing.__enter__().write(b"mine")
        (tmp_path / "raced").write_bytes(b"theirs")
        with pytest.raises(files.TargetExists):
            writing.__exit__(None, None, None)
        assert (tmp_path / "raced").read_bytes() == b"theirs"
        assert os.listdir(tmp_path) == ["raced"]

    def test_with_force_the_old_file_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with files.writing(str(path), force=True) as target:
            target.write(b"new")
            target.flush()
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["file"]

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, SystemExit])
    def test_an_interruption_leaves_everything_as_it_was(
        self, tmp_path: Path, interruption: type[BaseException]
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")

        def write_half() -> None:
            with files.writing(str(path), force=True) as target:
                target.write(b"half")
                raise interruption

        with pytest.raises(interruption):
            write_half()
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]

    def test_a_symbolic_link_stays_one(self, tmp_path: Path) -> None:
        (tmp_path / "real").write_bytes(b"old")
        (tmp_path / "link").symlink_to("real")
        with files.writing(str(tmp_path / "link"), force=True) as target:
            target.write(b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_bytes() == b"new"


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.writing(str(tmp_path / "none" / "file")):
        pytest.fail("it must not begin")


def test_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput), files.reading(str(tmp_path)):
        pytest.fail("it must not begin")


def test_a_device_is_written_to() -> None:
    with files.writing("/dev/null", force=True) as target:
        target.write(b"gone")
    assert Path("/dev/null").is_char_device()


HALF_DONE = """
import sys
import threading
from openkcm.cli import files
with files.writing(sys.argv[1], force=True) as target:
    target.write(b"x" * 5_000_000)
    target.flush()
    print("half", flush=True)
    sys.stdin.read()
"""


def test_kill_9_leaves_the_original_and_no_part_of_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_DONE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        unnamed = os.listdir(tmp_path) == ["file"]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    if not unnamed:
        pytest.skip("this file system has no files without a name, so one with a name stays")
    assert os.listdir(tmp_path) == ["file"]


def test_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    with files.reading(str(tmp_path / "file")) as source:
        assert files.size_of(source) == 3
    assert files.size_of(io.BytesIO(b"123")) is None


def test_blocks_written_behind_arrive_in_order(tmp_path: Path) -> None:
    blocks = [bytes([at]) * 2_000_000 for at in range(5)]
    with files.writing(str(tmp_path / "file")) as target, files.behind(target) as write:
        for block in blocks:
            write(block)
    assert (tmp_path / "file").read_bytes() == b"".join(blocks)


class Full(io.BytesIO):
    """A regular file on a disk that is full."""

    def __init__(self, like: Path) -> None:
        super().__init__()
        self._like = like.open("rb")
        self.tried = 0

    def fileno(self) -> int:
        return self._like.fileno()

    def write(self, data: object) -> int:
        self.tried += 1
        raise OSError(errno.ENOSPC, "no space left")

    def close(self) -> None:
        self._like.close()
        super().close()


@pytest.mark.parametrize(("blocks", "reached"), [(1, True), (2, False)])
def test_a_write_behind_that_fails_is_not_lost(tmp_path: Path, blocks: int, reached: bool) -> None:
    """The next write says so, or the end where there is none; what stands behind is not tried."""
    (tmp_path / "file").write_bytes(b"")
    after = []
    with Full(tmp_path / "file") as target:
        with pytest.raises(OSError, match="no space left"), files.behind(target) as write:
            for _ in range(blocks):
                write(b"block")
            after.append(True)
        assert target.tried == 1
    assert bool(after) is reached


def test_what_is_no_file_is_written_at_once() -> None:
    here = threading.get_ident()
    writers = []

    class Pipe(io.BytesIO):
        def write(self, data: object) -> int:
            writers.append(threading.get_ident())
            return 0

    with files.behind(Pipe()) as write:
        write(b"block")
        assert writers == [here]
