import os
import stat
import subprocess
import sys
import threading

import pytest

from fastsam_rwkv.files import sweep, temporary_folder, whole_file

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask, FIFO or lock of this kind")


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.png"
    for content in (b"first", b"second"):
        with whole_file(file) as stream:
            stream.write(content)
            stream.flush()
            assert not file.exists() or file.read_bytes() == b"first"
        assert file.read_bytes() == content
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(file) as stream:
            stream.write(b"half")
            raise error
    assert file.read_bytes() == b"second" and names(tmp_path) == {"a.png"}


@posix
def test_permissions_are_those_of_open(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_bytes(b"")
    old.chmod(0o604)
    before = os.umask(0o027)
    try:
        for file in (new, old):
            with whole_file(file) as stream:
                stream.write(b"x")
    finally:
        os.umask(before)
    assert mode(new) == 0o640 and mode(old) == 0o604


@posix
def test_a_symlink_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link.png", tmp_path / "elsewhere" / "target.png"
    link.symlink_to(target)
    for content in (b"new target", b"old target"):
        with whole_file(link) as stream:
            stream.write(content)
        assert link.is_symlink() and target.read_bytes() == content
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    with pytest.raises(OSError), whole_file(loop):
        pass


@posix
def test_a_fifo_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    with whole_file(tmp_path / "fifo") as stream:
        stream.write(b"through")
    reader.join(10)
    assert read == [b"through"] and names(tmp_path) == {"fifo"}


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "nothing" / "a.png"):
        pass


WAITING = """
import sys
from pathlib import Path
from fastsam_rwkv.files import temporary_folder, whole_file
with whole_file(sys.argv[1] + "/a.png") as stream, temporary_folder(Path(sys.argv[1]), "stage-") as folder:
    stream.write(b"half")
    stream.flush()
    (folder / "half").write_bytes(b"half")
    print("ready", flush=True)
    input()
"""


@posix
def test_leftovers_of_killed_processes_are_swept(tmp_path):
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    killed, alive = processes
    killed.kill()
    killed.wait()
    assert len(names(tmp_path)) == 4
    with whole_file(tmp_path / "b.png") as stream:
        stream.write(b"b")
    sweep(tmp_path.glob("stage-*"))
    assert len(names(tmp_path)) == 3  # b.png, and the other process's file and folder
    assert alive.communicate("\n")[0] == "" and alive.returncode == 0
    assert names(tmp_path) == {"a.png", "b.png"}
    for process in processes:
        process.stdin.close()
        process.stdout.close()


@posix
def test_sweep_follows_no_symlink(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "stage-link").symlink_to(tmp_path / "mine")
    sweep(tmp_path.glob("stage-*"))
    assert names(tmp_path) == {"mine", "stage-link"}


def test_a_temporary_folder_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path, "stage-") as folder:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == set()
