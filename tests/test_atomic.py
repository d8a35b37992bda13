"""Files are written completely or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratune import atomic
from loratune.errors import OutputError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_directory_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic.new_directory(target) as temporary:
        (temporary / "x").write_text("1")
        assert not target.exists()
    assert tree(tmp_path) == {"a/b/x": b"1"}


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic.new_directory(tmp_path / "new") as temporary:
        (temporary / "x").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_needs_overwrite_and_survives_failure(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OutputError), atomic.new_directory(target):
        pass
    with pytest.raises(RuntimeError), atomic.new_directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError
    assert tree(tmp_path) == {"out/old": b"old"}
    with atomic.new_directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert tree(tmp_path) == {"out/new": b"new"}


def test_a_file_too_large_for_the_disk_leaves_the_old_one(tmp_path):
    """A limit of 4 KiB on files of this process. The system reports it like a full disk."""
    (tmp_path / "file").write_text("old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from loratune import atomic\n"
        "from loratune.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: atomic.write_bytes(Path(sys.argv[1]), b'x' * 100000)\n"
        "except OutputError as error: print(error); sys.exit(2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stdout
    assert tree(tmp_path) == {"file": b"old"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "file", "x")
        with atomic.new_directory(tmp_path / "dir"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "dir").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", ["gone", "gone/inner", "loop", "loop/inner"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_nowhere_is_refused_before_any_work(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match=rf"{name.partition('/')[0]}: is a link to a missing place; remove it"):
        atomic.check_new(tmp_path / name, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "loop"]


def test_a_link_to_a_folder_is_an_output_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    atomic.check_new(tmp_path / "link", overwrite=False)
    with atomic.new_directory(tmp_path / "link" / "inner") as temporary:
        (temporary / "x").write_text("1")
    assert tree(tmp_path / "real") == {"inner/x": b"1"}


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "a\0b"])
def test_a_name_that_no_file_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"(caf\\udce9|a\\0b): this name is not UTF-8 text; rename"):
        atomic.check_new(tmp_path / name, overwrite=False)
