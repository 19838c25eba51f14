"""Stored activations: a kill at any moment leaves a readable beginning, and what is resumed ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftlab.errors import CheckpointError, OutputError
from peftlab.inspection import shards
from peftlab.inspection.shards import ROW, ActivationStore, open_activations

ROWS_OF_TEXT = (3, 0, 2, 1, 4, 2)
WIDTH = 5


def store(folder: Path, *, num_texts: int = len(ROWS_OF_TEXT), **changes: Any) -> ActivationStore:
    settings: dict[str, Any] = {
        "layers": ["layer_0", "layer_2"],
        "stack": "layers",
        "pooling": "token",
        "proof": "equal",
        "num_texts": num_texts,
        "made_from": {"model": "m", "texts": "t"},
    }
    return ActivationStore(folder, **settings | changes)


def made(text: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The rows of one text: every value tells text, row and layer."""
    num_rows = ROWS_OF_TEXT[text % len(ROWS_OF_TEXT)]
    rows = np.zeros(num_rows, ROW)
    rows["text"], rows["token_start"] = text, np.arange(num_rows)
    values = np.arange(num_rows * WIDTH, dtype=np.float32).reshape(num_rows, WIDTH) + 100 * text
    return {"layer_0": values, "layer_2": -values}, rows


def append(to: ActivationStore, first: int, last: int) -> None:
    for text in range(first, last):
        values, rows = made(text)
        to.append(values, rows, texts_done=text + 1)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check(folder: Path, num_texts: int) -> None:
    """What is complete is right."""
    found = open_activations(folder)
    assert found.num_texts == num_texts
    for text in range(num_texts):
        values, rows = made(text)
        here = found.rows_of(text)
        assert found.rows[here].tobytes() == rows.tobytes()
        for layer, expected in values.items():
            assert np.array_equal(found[layer][here], expected)


def test_what_is_stored_is_read_back_mapped(tmp_path: Path) -> None:
    with store(tmp_path / "a") as out:
        append(out, 0, 6)
    check(tmp_path / "a", 6)
    found = open_activations(str(tmp_path / "a"))
    assert list(found) == ["layer_0", "layer_2"]
    assert all(isinstance(found[layer], np.memmap) for layer in found)
    assert found["layer_0"].shape == (12, WIDTH)
    assert found.rows_of(1) == slice(3, 3)  # a text without rows
    assert found.complete
    with pytest.raises(IndexError, match="text 6 of 6"):
        found.rows_of(6)
    plain = np.memmap(tmp_path / "a" / "layer_2.bin", "<f4", mode="r", shape=(12, WIDTH))
    assert np.array_equal(plain, found["layer_2"])


def test_a_store_without_rows_yet_can_be_read(tmp_path: Path) -> None:
    store(tmp_path / "a")
    found = open_activations(tmp_path / "a")
    assert (len(found), found.num_texts, found.complete, len(found.rows)) == (0, 0, False, 0)


def test_an_interrupted_store_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store(tmp_path / "whole") as out:
        append(out, 0, 6)
    with store(tmp_path / "cut") as out, monkeypatch.context() as broken:
        append(out, 0, 3)
        broken.setattr(shards, "write_json", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):  # the rows are written, the index is not
            append(out, 3, 4)
    assert (tmp_path / "cut" / "layer_0.bin").stat().st_size > 5 * WIDTH * 4
    check(tmp_path / "cut", 3)
    assert not open_activations(tmp_path / "cut").complete
    with store(tmp_path / "cut") as again:
        assert again.texts_done == 3
        append(again, 3, 6)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


_WRITER = """
import sys
sys.path[:0] = [{tests!r}]
import test_shards
with test_shards.store(test_shards.Path({folder!r}), num_texts=100_000) as out:
    test_shards.append(out, out.texts_done, {last})
"""


def test_a_killed_process_leaves_a_readable_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    for _ in range(3):
        code = _WRITER.format(tests=str(Path(__file__).parent), folder=str(folder), last=100_000)
        process = subprocess.Popen([sys.executable, "-c", code])
        before = open_activations(folder).num_texts if folder.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (folder / "index.json").exists() and open_activations(folder).num_texts > before + 5:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert open_activations(folder).num_texts > before
        check(folder, open_activations(folder).num_texts)
    reached = open_activations(folder).num_texts
    with store(folder, num_texts=100_000) as out:
        append(out, reached, reached + 2)
    with store(tmp_path / "whole", num_texts=100_000) as whole:
        append(whole, 0, reached + 2)
    left = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
    assert left == contents(tmp_path / "whole")


def test_rows_are_on_the_disk_before_the_index_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    sync, write = os.fsync, shards.write_json
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_ino), sync(file)))
    with store(tmp_path / "a") as out:
        append(out, 0, 1)
        events.clear()
        monkeypatch.setattr(shards, "write_json", lambda *told: (events.append("index"), write(*told)))
        append(out, 2, 3)
    before = set(events[: events.index("index")])
    for name in ("layer_0.bin", "layer_2.bin", "rows.bin", "."):
        assert (tmp_path / "a" / name).stat().st_ino in before, name


def test_a_full_disk_is_told_and_what_was_stored_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store(tmp_path / "a") as out:
        append(out, 0, 2)
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OutputError, match=r"No space left on device; 2 texts are stored"):
                append(out, 2, 3)
        check(tmp_path / "a", 2)
        append(out, 2, 6)  # there is room again
    check(tmp_path / "a", 6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"made_from": {"model": "other", "texts": "t"}}, "model"),
        ({"made_from": {"model": "m", "texts": "other"}}, "texts"),
        ({"layers": ["layer_0"]}, "layers"),
        ({"pooling": "mean"}, "pooling"),
        ({"stack": "decoder"}, "stack"),
        ({"num_texts": 7}, "num_texts"),
    ],
)
def test_another_extraction_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with store(tmp_path / "a") as out:
        append(out, 0, 2)
    before = contents(tmp_path / "a")
    with pytest.raises(OutputError, match=rf"something else \(other {named}\)"):
        store(tmp_path / "a", **changes)
    assert contents(tmp_path / "a") == before


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds other things \(letters.txt\)"):
        store(tmp_path)
    with pytest.raises(OutputError, match="holds no activations"):
        open_activations(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        store(tmp_path / "letters.txt" / "a")
    (tmp_path / "index.json").write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(OutputError, match="not an index of activations"):
        open_activations(tmp_path)


@pytest.mark.parametrize("name", ["layer_2.bin", "rows.bin"])
def test_a_damaged_file_is_told(tmp_path: Path, name: str) -> None:
    with store(tmp_path / "a") as out:
        append(out, 0, 6)
    with (tmp_path / "a" / name).open("r+b") as file:
        file.truncate(7)
    with pytest.raises(CheckpointError, match=rf"{name} is missing or shorter than the 12 rows"):
        open_activations(tmp_path / "a")
    with pytest.raises(CheckpointError, match=name), store(tmp_path / "a") as out:
        append(out, 5, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda _: [], OutputError, "not an index of activations of format 1"),
        (lambda _: "dear", OutputError, "not an index of activations"),
        (lambda index: {"format": 1, "rows_done": index["rows_done"]}, CheckpointError, "texts_done, num_texts, stack"),
        (lambda index: index | {"rows_done": -1}, CheckpointError, "rows_done missing or not as written"),
        (lambda index: index | {"texts_done": "6"}, CheckpointError, "damaged: texts_done"),
        (lambda index: index | {"widths": [5]}, CheckpointError, "damaged: widths"),
        (lambda index: index | {"dtype": "float"}, CheckpointError, "damaged: dtype"),
        (lambda index: index | {"made_from": None}, CheckpointError, "damaged: made_from"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_told(
    tmp_path: Path, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with store(tmp_path / "a") as out:
        append(out, 0, 6)
    index = tmp_path / "a" / "index.json"
    index.write_text(json.dumps(change(json.loads(index.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(error, match=message):
        open_activations(tmp_path / "a")
    with pytest.raises(error, match=message):
        store(tmp_path / "a")


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    with store(tmp_path / "a") as out:
        append(out, 0, 6)
    code = (
        "import sys; from peftlab.inspection.shards import open_activations;"
        f"print(open_activations({str(tmp_path / 'a')!r})['layer_0'].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"(12, {WIDTH}) False"
