"""Downloads: fetched once, checked, unpacked below their folder alone; data sets by hub name."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import stat
import sys
import tarfile
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftlab import downloads, hub_data
from peftlab.config import TaskSettings
from peftlab.downloads import fetch, unpack
from peftlab.errors import DataError
from peftlab.hub_data import save_hub_data
from peftlab.task_data import load_splits

ROWS = [{"prompt": f"say {n}", "completion": f"word {n}"} for n in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[dict[str, Any]]:
    """A server on this machine; "files" by path, "asked" counts, "short" breaks off."""
    state: dict[str, Any] = {"files": {}, "asked": [], "short": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["asked"].append(self.path)
            data = state["files"].get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write((data or b"")[: len(data or b"") - state["short"]])

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state["url"] = f"http://127.0.0.1:{made.server_port}"
    yield state
    made.shutdown()
    made.server_close()
    thread.join()


def test_fetched_once_and_checked(server: dict[str, Any], tmp_path: Path) -> None:
    server["files"]["/d/a.txt"] = b"hello"
    url, digest = f"{server['url']}/d/a.txt", hashlib.sha256(b"hello").hexdigest()
    first = fetch(url)
    assert (first.path.read_bytes(), first.path.name, first.sha256) == (b"hello", "a.txt", digest)
    assert fetch(url, sha256=digest) == first
    assert len(server["asked"]) == 1
    first.path.write_bytes(b"damaged")
    assert fetch(url).path.read_bytes() == b"hello", "a damaged file is fetched again"
    assert len(server["asked"]) == 2
    with pytest.raises(DataError, match=f"has the sha256 {digest}, expected {'0' * 64}; it is not used"):
        fetch(url, sha256="0" * 64)
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_cannot_be_fetched(server: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the server says 404"):
        fetch(f"{server['url']}/gone")
    server["files"]["/a"], server["short"] = b"hello", 2
    with pytest.raises(DataError, match=r"broke off after 3 of 5 bytes|cannot be fetched"):
        fetch(f"{server['url']}/a")
    server["short"] = 0
    with pytest.raises(DataError, match="is larger than 3 bytes"):
        fetch(f"{server['url']}/a", most_bytes=3)
    assert fetch(f"{server['url']}/a").path.read_bytes() == b"hello"
    with pytest.raises(DataError, match="without a network, download it elsewhere and give its path"):
        fetch("http://127.0.0.1:9/a")
    with pytest.raises(DataError, match="give a path, or a URL with http, https, file"):
        fetch("ftp://127.0.0.1/a")
    with pytest.raises(DataError, match="there is no file"):
        fetch(str(tmp_path / "gone"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_paths_and_file_urls(tmp_path: Path) -> None:
    path = tmp_path / "a b.txt"
    path.write_bytes(b"x")
    assert fetch(str(path)).path == path
    assert fetch(path.as_uri()).path.read_bytes() == b"x"
    with pytest.raises(DataError, match="it was changed or is damaged"):
        fetch(str(path), sha256="0" * 64)


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for member, content in members:
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


def zip_of(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(member, content)
    return path


def test_unpacked_once(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"data/train.jsonl": LINES, "data/sub/x": b"1"})
    folder = unpack(archive)
    assert folder.name == "data"
    assert (folder / "train.jsonl").read_bytes() == LINES
    before = (folder / "sub" / "x").stat().st_ino
    assert unpack(archive) == folder
    assert (folder / "sub" / "x").stat().st_ino == before
    (folder / "sub" / "x").write_bytes(b"2")
    assert (unpack(archive) / "sub" / "x").read_bytes() == b"1", "a changed file is unpacked anew"
    packed = tar_of(tmp_path / "a.tar.gz", [(tarfile.TarInfo("train.jsonl"), LINES)])
    assert (unpack(packed) / "train.jsonl").read_bytes() == LINES


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("/evil"),
        tarfile.TarInfo("a/../../evil"),
        tarfile.TarInfo("..\\evil"),
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard", tarfile.LNKTYPE, "ok"),
        special("pipe", tarfile.FIFOTYPE),
        special("device", tarfile.CHRTYPE),
        special("../folder", tarfile.DIRTYPE),
    ],
    ids=lambda member: member.name.replace("/", "_"),
)
def test_members_that_leave_their_folder_are_refused(member: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", [(tarfile.TarInfo("ok"), b"1"), (member, b"")])
    with pytest.raises(
        DataError, match=r"outside of its folder; the archive is refused|is a link or a device"
    ):
        unpack(archive)
    assert not [p for p in tmp_path.rglob("*") if p.name in ("evil", "ok", "link", "pipe")], "nothing is left"
    if member.isfile():
        with pytest.raises(DataError, match="outside of its folder"):
            unpack(zip_of(tmp_path / "a.zip", {member.name: b"1"}))


def test_bombs_and_damage(tmp_path: Path) -> None:
    bomb = zip_of(tmp_path / "bomb.zip", {"zeros": b"\0" * 5_000_000})
    assert bomb.stat().st_size < 10_000
    with pytest.raises(DataError, match="unpacks to more than 1,000,000 bytes"):
        unpack(bomb, most_bytes=1_000_000)
    with pytest.raises(DataError, match="more than 2 files"):
        unpack(zip_of(tmp_path / "many.zip", {str(n): b"" for n in range(3)}), most_files=2)
    with pytest.raises(DataError, match="is a link or a device"):
        unpack(zip_of(tmp_path / "link.zip", {"l": b"/etc/passwd"}, stat.S_IFLNK | 0o777))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match=r"neither a \.zip nor a \.tar archive"):
        unpack(tmp_path / "text")
    whole = tar_of(tmp_path / "t.tar.gz", [(tarfile.TarInfo("big"), bytes(range(256)) * 4000)])
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(DataError, match="is damaged or no archive"):
        unpack(torn)
    with pytest.raises(DataError, match="holds no files"):
        unpack(tar_of(tmp_path / "none.tar", []))
    with pytest.raises(DataError, match="holds 'a' twice"):
        unpack(tar_of(tmp_path / "twice.tar", [(tarfile.TarInfo("a"), b"1"), (tarfile.TarInfo("a"), b"2")]))
    assert unpack(bomb).is_dir(), "within the limit it is unpacked"


def test_a_task_reads_an_archive(server: dict[str, Any], tmp_path: Path) -> None:
    server["files"]["/data.zip"] = zip_of(tmp_path / "d.zip", {"mine/rows.jsonl": LINES}).read_bytes()
    settings = TaskSettings(name="jsonl", archive=f"{server['url']}/data.zip")
    splits = load_splits(settings, seed=1)
    assert len(splits.train) == 16
    assert "pin it with task.archive_sha256" in splits.notes[0]


class HubFake(types.ModuleType):
    """`datasets` as far as it is used."""

    def __init__(self, found: Any) -> None:
        super().__init__("datasets")
        self.found, self.asked = found, []

    def load_dataset(self, path: str, subset: str | None) -> Any:
        self.asked.append((path, subset))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_a_task_reads_a_data_set_by_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = HubFake({"train": ROWS[:16], "dev": ROWS[16:18], "test": ROWS[18:]})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for name in ("jsonl", "csv"):
        splits = load_splits(TaskSettings(name=name, hub="me/words:small"), seed=1)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 2, 2]
        assert splits.notes[0].startswith("data set me/words:small of the hub")
    load_splits(TaskSettings(name="csv", hub="me/words:small"), seed=1)
    assert fake.asked == [("me/words", "small")] * 2, "one folder serves one form; asked once for each form"


def test_columns_of_the_hub_are_renamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", HubFake({"train": [{"q": "a", "n": 1}]}))
    for file in ("t.jsonl", "t.json"):
        folder = save_hub_data(f"x{file}", names={"train": file, "test": "e"}, columns={"q": "prompt"})
        found = json.loads((folder / file).read_text())
        assert found in ({"prompt": "a", "n": 1}, [{"prompt": "a", "n": 1}])


def test_hub_names_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl = TaskSettings(name="jsonl", hub="me/words")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"'datasets', which is not installed: pip install \"peftlab\[hub\]\""
    ):
        load_splits(jsonl, seed=1)
    monkeypatch.setitem(sys.modules, "datasets", HubFake(ConnectionError("no route\nlong story")))
    with pytest.raises(DataError, match="me/words cannot be had: no route; check the name"):
        load_splits(jsonl, seed=1)
    monkeypatch.setitem(sys.modules, "datasets", HubFake({"test": ROWS}))
    with pytest.raises(DataError, match="has no train split; it has test"):
        load_splits(jsonl, seed=1)
    with pytest.raises(DataError, match="the task 'embedded' cannot be read from the hub"):
        load_splits(TaskSettings(hub="me/words"), seed=1)
    assert hub_data.INSTALL.startswith("pip install")
