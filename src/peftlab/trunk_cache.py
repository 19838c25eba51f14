"""Hidden states of rows on disk, mapped into memory: written once, read by every later pass over the same rows.

A cache is a folder named after all that decides the states. In it lie pairs of files, one pair for each process that wrote:

```
states-PID-RANDOM.bin     hidden states, token after token: (tokens, hidden)
index-PID-RANDOM.jsonl    {"row": digest of the row's tokens, "start": first token, "tokens": how many}
```

A line is written when its states are on the disk, so that a kill at any moment leaves what the lines say. Writers never
touch each other's files. Reading maps the files; what lies beyond a file's end is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from peftlab.errors import OutputError

_TOUCHED = "last_used"


def row_digest(input_ids: Sequence[int]) -> str:
    """What a row's states are kept under.

    Args:
        input_ids: The row's tokens.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.blake2b(np.asarray(input_ids, dtype="<i8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row's states lie."""

    states: torch.Tensor
    start: int
    tokens: int


class TrunkCache:
    """The states of rows under one key.

    Args:
        root: The folder of all trunk caches.
        key: All that decides the states, hashed.
        width: Features of a state.
        dtype: Of the states.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, root: Path, key: str, *, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = root / key, width, dtype
        self._places: dict[str, _Place] = {}
        self._files: tuple[IO[bytes], IO[str]] | None = None
        self._written = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _TOUCHED).touch()
        except OSError as error:
            raise OutputError(
                f"the trunk cache {self.folder} cannot be written: {error.strerror or error}"
            ) from None
        for index in sorted(self.folder.glob("index-*.jsonl")):
            self._read(index)

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Bytes of the states that are there."""
        return sum(place.tokens for place in self._places.values()) * self.width * self.dtype.itemsize

    def read(self, digest: str) -> torch.Tensor:
        """The states of one row.

        Args:
            digest: From `row_digest`.

        Returns:
            (tokens, width), mapped; not to be written to.
        """
        place = self._places[digest]
        return place.states[place.start : place.start + place.tokens]

    def add(self, rows: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep the states of rows; those that are there already stay as they are.

        Args:
            rows: The row's digest, and its states (tokens, width).

        Raises:
            OutputError: They cannot be written.
        """
        fresh = {digest: states for digest, states in rows if digest not in self._places}
        if not fresh:
            return
        try:
            states, index = self._open()
            begins, lines = {}, []
            for digest, values in fresh.items():
                begins[digest] = self._written
                states.write(values.to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes())
                lines.append(
                    json.dumps({"row": digest, "start": self._written, "tokens": len(values)}) + "\n"
                )
                self._written += len(values)
            states.flush()
            os.fsync(states.fileno())
            index.writelines(lines)
            index.flush()
        except OSError as error:
            raise OutputError(
                f"the trunk cache {self.folder} cannot be written: {error.strerror or error}; free the disk, or turn it off"
                " with training.trunk_cache_gigabytes=0"
            ) from None
        mapped = self._map(Path(states.name))
        for digest, start in begins.items():
            self._places[digest] = _Place(mapped, start, len(fresh[digest]))

    def close(self) -> None:
        """Close the files; adding opens new ones."""
        for file in self._files or ():
            file.close()
        self._files = None

    def _open(self) -> tuple[IO[bytes], IO[str]]:
        """This process's own pair of files."""
        if self._files is None:
            name = f"{os.getpid()}-{secrets.token_hex(4)}"
            self._files = (
                (self.folder / f"states-{name}.bin").open("wb"),
                (self.folder / f"index-{name}.jsonl").open("w", encoding="utf-8"),
            )
            self._written = 0
        return self._files

    def _read(self, index: Path) -> None:
        """Take over what a writer left; from a damaged line on, such as one cut short, rows are computed anew."""
        path = index.with_name(index.name.replace("index-", "states-")).with_suffix(".bin")
        if not path.is_file() or not path.stat().st_size:
            return
        mapped = self._map(path)
        for line in index.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                return
            try:
                entry = json.loads(line)
                row, start, tokens = str(entry["row"]), int(entry["start"]), int(entry["tokens"])
            except (ValueError, KeyError, TypeError):
                return
            if start >= 0 and tokens > 0 and start + tokens <= len(mapped):
                self._places[row] = _Place(mapped, start, tokens)

    def _map(self, path: Path) -> torch.Tensor:
        """A file of states, (tokens, width)."""
        size = self.width * self.dtype.itemsize
        tokens = path.stat().st_size // size
        found = torch.from_file(
            str(path), shared=False, size=tokens * self.width, dtype=self.dtype
        )  # private: what is written to it stays in memory
        return found.view(tokens, self.width)


def make_room(root: Path, key: str, *, needed: int, limit: int) -> bool:
    """Delete the trunk caches that were not used for longest until there is room for one more.

    Args:
        root: The folder of all trunk caches.
        key: The one that room is made for; it stays.
        needed: Bytes that it will have.
        limit: Bytes of all.

    Returns:
        Whether there is room.
    """
    if needed > limit:
        return False
    others = [f for f in root.iterdir() if f.is_dir() and f.name != key] if root.is_dir() else []
    sizes = {folder: sum(file.stat().st_size for file in folder.glob("*")) for folder in others}
    for folder in sorted(others, key=_last_use):
        if needed + sum(sizes.values()) <= limit:
            break
        shutil.rmtree(folder)
        del sizes[folder]
    return True


def _last_use(folder: Path) -> float:
    """When a cache was opened last."""
    file = folder / _TOUCHED
    return (file if file.exists() else folder).stat().st_mtime
