"""Weights are in the system's cache before they are read."""

from __future__ import annotations

import os
import time

import pytest

from loratune.ahead import read_ahead

SIZE = 24 << 20


def cached(file) -> bool:
    """True if the whole file can be read without waiting for the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    buffer = bytearray(1 << 20)
    try:
        got = [os.preadv(descriptor, [buffer], at, os.RWF_NOWAIT) for at in range(0, SIZE, len(buffer))]
    except BlockingIOError:
        return False
    except OSError as error:
        pytest.skip(f"this file system does not report the content of the cache: {error}")
    finally:
        os.close(descriptor)
    return sum(got) == SIZE


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux reports the content of its cache")
def test_files_are_read_while_nobody_asks_for_them(tmp_path):
    files = [tmp_path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file in files:
        file.write_bytes(os.urandom(SIZE))
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if all(map(cached, files)):
        pytest.skip("this file system keeps everything in memory")
    thread = read_ahead(str(tmp_path))
    assert thread is not None
    thread.join()
    deadline = time.monotonic() + 30
    while not all(map(cached, files)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(cached, files))


def test_what_is_no_folder_with_weights_is_left_alone(tmp_path):
    assert read_ahead("no/such-model") is None
    assert read_ahead(str(tmp_path)) is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert read_ahead(str(tmp_path)) is None
