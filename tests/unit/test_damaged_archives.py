"""Archives and servers that are broken: nothing is taken for whole that is not, and every refusal is in words."""

from __future__ import annotations

import hashlib
import http.server
import io
import random
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftlab import downloads
from peftlab.downloads import fetch, unpack
from peftlab.errors import DataError

NAMES = [f"part-{number:02}.txt" for number in range(12)]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "some", "text"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))


def packed(path: Path, mode: str, files: dict[str, bytes] | None = None) -> Path:
    draw = random.Random(0)
    made = files or {name: " ".join(draw.choices(WORDS, k=400)).encode() for name in NAMES}
    with tarfile.open(path, mode) as archive:
        for name, content in made.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_changed_bytes_are_told(tmp_path: Path, kind: str, place: float) -> None:
    path = packed(tmp_path / f"a.tar.{kind}", f"w:{kind}")
    whole = path.read_bytes()
    assert len(list(unpack(path).iterdir())) == len(NAMES)
    start = int(place * len(whole))
    changed = bytearray(whole)
    changed[start : start + 40] = random.Random(1).randbytes(40)
    path.write_bytes(changed)
    with pytest.raises(DataError, match="damaged"):
        unpack(path)


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_tar_cut_between_two_members(tmp_path: Path, kind: str) -> None:
    """The tarfile module reads such a one as a shorter archive."""
    plain = packed(tmp_path / "a.tar", "w")
    with tarfile.open(plain) as archive:
        second = archive.getmembers()[2].offset
    raw = plain.read_bytes()
    path = tmp_path / f"cut.tar.{kind}"
    path.write_bytes(compressed(raw[:second], kind))
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 2
    with pytest.raises(DataError, match="its end marker is not where its files end"):
        unpack(path)


def compressed(raw: bytes, kind: str) -> bytes:
    import bz2
    import gzip
    import lzma

    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "": bytes}[kind](raw)


def test_tar_with_a_damaged_header(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", "w")
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    raw = bytearray(path.read_bytes())
    raw[third : third + 512] = bytes(512)  # as a disk leaves a page that was never written
    path.write_bytes(raw)
    with pytest.raises(DataError, match="its end marker"):
        unpack(path)
    raw[third : third + 512] = b"\x07" * 512
    path.write_bytes(raw)
    with pytest.raises(DataError, match="its end marker"):
        unpack(path)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not UTF-8"):
        unpack(packed(tmp_path / "a.tar", "w", {"a\udc80": b"1"}))
    with pytest.raises(DataError, match="a file without a name"):
        unpack(packed(tmp_path / "b.tar", "w", {"": b"1"}))


def test_a_file_of_checksums_in_an_archive_stays(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", "w", {"checksums.json": b"{}", "train.jsonl": b"x"})
    folder = unpack(path)
    assert (folder / "checksums.json").read_bytes() == b"{}"
    assert sorted(found.name for found in folder.iterdir()) == ["checksums.json", "train.jsonl"]
    (folder / "train.jsonl").write_bytes(b"evil")
    assert (unpack(path) / "train.jsonl").read_bytes() == b"x"


@pytest.fixture
def odd_server() -> Iterator[str]:
    """A server that answers oddly, each path in its own way."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            if self.path == "/garbage":
                self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
                return
            self.send_response(200)
            if self.path == "/chunks":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"64\r\n" + b"x" * 10)
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_header("Content-Length", "abc" if self.path == "/length" else "5")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


def test_answers_that_are_none(odd_server: str) -> None:
    with pytest.raises(DataError, match="gives no answer of HTTP"):
        fetch(f"{odd_server}/garbage")
    with pytest.raises(DataError, match=r"broke off after \d+ bytes"):
        fetch(f"{odd_server}/chunks")
    with pytest.raises(DataError, match=r"is larger than 3 bytes and is not fetched$"):
        fetch(f"{odd_server}/large", most_bytes=3)
    with pytest.raises(DataError, match="neither a path nor a URL"):
        fetch("http://[::1")


@pytest.mark.parametrize("path", ["/a b.zip", "/é.zip", "/..", "/", "/length", "/" + "x" * 400 + ".zip"])
def test_odd_addresses_are_fetched(odd_server: str, path: str) -> None:
    digest = hashlib.sha256(b"hello").hexdigest()
    assert fetch(odd_server + path, sha256=digest.upper()).path.read_bytes() == b"hello"
