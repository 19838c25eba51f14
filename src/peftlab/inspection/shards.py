"""Activations: rows of vectors in the order of the texts, in memory or as files that grow and can be mapped.

A stored extraction is a folder:

```
index.json      what the files hold, how much of them is complete, and what they were made from
rows.bin        one record of ROW for each row
layer_3.bin     the vectors of layer 3, row after row: dtype and width are in the index
```

The files only grow. What is appended is flushed to the disk before the index says that it is there, and the index is
replaced in one move, so that a kill at any moment leaves what the index says. Reading needs numpy and nothing else:
`numpy.memmap("layer_3.bin", dtype="<f4", mode="r", shape=(rows_done, width))`.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from peftlab.errors import CheckpointError, OutputError
from peftlab.files import sync_path, write_json

ROW = np.dtype(
    [
        (name, "<i4")
        for name in ("text", "token_start", "token_end", "character_start", "character_end", "word")
    ]
)
"""What a row stands for: the text's number; first and last + 1 of its tokens that the row is the mean of, special tokens
counted; first and last + 1 of its characters, equal for a token that the tokenizer added; the number of its word, -1 where
the row is no word nor part of one."""

_INDEX, _ROWS = "index.json", "rows.bin"
_FORMAT = 1

Values = TypeVar("Values")
"""What holds a layer's vectors: a torch tensor in memory, a mapped numpy array on disk."""


@dataclass(frozen=True, slots=True, eq=False)
class Activations(Mapping[str, Values], Generic[Values]):
    """What blocks put out for some texts; a mapping from `layer_i` to values (rows, hidden). Pads have no rows.

    Attributes:
        layers: `layer_i` to values, in the order of the layers.
        rows: What each row stands for, records of `ROW`, in the order of the texts.
        num_texts: Texts that the rows are of; a text can be without rows.
        stack: The stack of blocks.
        pooling: What a row is: token, word, mean, last or cls.
        proof: What the family map says of these blocks' outputs against the model's own hidden states: "equal", or what
            differs (Mamba numbers its hidden states otherwise), or that nothing was tried.
        complete: Whether all texts asked for are there; only what is on disk can be incomplete.

    Example:
        >>> activations["layer_3"][activations.rows_of(0)]  # the first text
    """

    layers: Mapping[str, Values]
    rows: npt.NDArray[np.void]
    num_texts: int
    stack: str
    pooling: str
    proof: str = "no certificate"
    complete: bool = True

    def __getitem__(self, layer: str) -> Values:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def rows_of(self, text: int) -> slice:
        """The rows of one text.

        Args:
            text: Its number, from 0.

        Returns:
            A slice for the values of any layer and for `rows`; empty for a text without rows.

        Raises:
            IndexError: There is no such text.
        """
        if not 0 <= text < self.num_texts:
            raise IndexError(f"text {text} of {self.num_texts}")
        start = bisect_left(self.rows, text, key=_text_of)
        return slice(start, bisect_left(self.rows, text + 1, lo=start, key=_text_of))


def open_activations(folder: Path | str) -> Activations[npt.NDArray[Any]]:
    """Stored activations, mapped: only what is looked at is read. Needs no torch.

    Args:
        folder: What `extract_activations` was given as `output`; it may be at work still, or have been killed.

    Returns:
        The activations that are complete.

    Raises:
        OutputError: The folder holds no activations.
        CheckpointError: The index is damaged, or a file is shorter than it says.
    """
    folder = Path(folder)
    index = _read_index(folder)
    if index is None:
        raise OutputError(f"{folder} holds no activations: it has no {_INDEX}")
    num_rows = index["rows_done"]
    return Activations(
        layers={
            layer: _map(folder / f"{layer}.bin", np.dtype(index["dtype"]), num_rows, width)
            for layer, width in index["widths"].items()
        },
        rows=_map(folder / _ROWS, ROW, num_rows),
        num_texts=index["texts_done"],
        stack=index["stack"],
        pooling=index["pooling"],
        proof=index["proof"],
        complete=index["texts_done"] == index["num_texts"],
    )


class ActivationStore:
    """Appends activations to a folder; an older extraction of the same things there goes on where it stood.

    Args:
        folder: Where; made if needed.
        layers: `layer_i` of what is stored.
        stack: The stack of blocks.
        pooling: What a row is.
        proof: What is known of the blocks' outputs, see `Activations`.
        num_texts: Texts that there will be.
        made_from: Everything that decides the values, as text: hashes of the model and the texts, settings.

    Attributes:
        texts_done: Texts that are stored.

    Raises:
        OutputError: The folder cannot be written, holds something else, or was made from something else.
        CheckpointError: The index is damaged, or a file is shorter than it says.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        layers: Sequence[str],
        stack: str,
        pooling: str,
        proof: str,
        num_texts: int,
        made_from: Mapping[str, str],
    ) -> None:
        self.folder = Path(folder)
        self._files: dict[str, IO[bytes]] = {}
        self._index: dict[str, Any] = {
            "format": _FORMAT,
            "stack": stack,
            "pooling": pooling,
            "proof": proof,
            "layers": list(layers),
            "num_texts": num_texts,
            "made_from": dict(made_from),
        }
        found = self._begin()
        self._index |= {key: found[key] for key in ("dtype", "widths", "texts_done", "rows_done")}

    @property
    def texts_done(self) -> int:
        """Texts that are stored."""
        return int(self._index["texts_done"])

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; appending opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def append(
        self, values: Mapping[str, npt.ArrayLike], rows: npt.NDArray[np.void], *, texts_done: int
    ) -> None:
        """Add the rows of the next texts; when it returns, they are on the disk.

        Args:
            values: `layer_i` to vectors (rows, hidden), all of one dtype: arrays, or torch tensors on the CPU.
            rows: What they stand for.
            texts_done: Texts that are stored with these.

        Raises:
            OutputError: The disk is full or cannot be written; what was stored before stays.
        """
        arrays = {layer: np.asarray(value) for layer, value in values.items()}
        dtype = next(iter(arrays.values())).dtype.newbyteorder("<")
        index = self._index | {
            "dtype": dtype.str,
            "widths": {layer: array.shape[1] for layer, array in arrays.items()},
            "texts_done": texts_done,
            "rows_done": self._index["rows_done"] + len(rows),
        }
        sizes = {layer: width * dtype.itemsize for layer, width in index["widths"].items()}
        try:
            self._open(sizes | {"rows": ROW.itemsize})
            for name, array in [*arrays.items(), ("rows", rows)]:
                self._files[name].write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            sync_path(self.folder)
            write_json(self.folder / _INDEX, index)
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror or error}; {self.texts_done} texts are stored, the same"
                " call goes on from there"
            ) from error
        else:
            self._index = index
        finally:
            if self._index is not index:  # opening again cuts off what was written beyond the index
                self.close()

    def _begin(self) -> dict[str, Any]:
        """The index of what is there, a new one where nothing is.

        Returns:
            The index.

        Raises:
            OutputError: The folder cannot be written or holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        found = _read_index(self.folder)
        if found is None:
            if held:
                raise OutputError(
                    f"{self.folder} holds other things ({', '.join(held[:5])}): give a new or empty folder"
                )
            new: dict[str, Any] = {"dtype": None, "widths": {}, "texts_done": 0, "rows_done": 0}
            write_json(self.folder / _INDEX, self._index | new)
            return new
        changed = [key for key, value in _flat(self._index).items() if _flat(found).get(key) != value]
        if changed:
            raise OutputError(
                f"{self.folder} holds activations of something else (other {', '.join(changed)}): give another folder,"
                " or the model, texts and settings that it was begun with"
            )
        return found

    def _open(self, sizes: Mapping[str, int]) -> None:
        """Open the files, name to bytes of a row, for appending; cut to what is complete."""
        if self._files:
            return
        done = self._index["rows_done"]
        for name, size in sizes.items():
            path = self.folder / f"{name}.bin"
            self._files[name] = path.open("ab")
            if path.stat().st_size < done * size:
                raise CheckpointError(_too_short(path, done))
            self._files[name].truncate(done * size)


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder, None where it has none."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / _INDEX} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise OutputError(f"{folder / _INDEX} is not an index of activations of format {_FORMAT}")
    wrong = [key for key, is_right in _PARTS.items() if key not in index or not is_right(index[key])]
    if wrong:
        raise CheckpointError(
            f"{folder / _INDEX} is damaged: {', '.join(wrong)} missing or not as written; extract anew into another folder"
        )
    return index


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def _is_dtype(value: Any) -> bool:
    """Whether a value is the name of a dtype as numpy writes it, or the sign that nothing is stored yet."""
    return value is None or (isinstance(value, str) and re.fullmatch(r"[<>|]f\d+", value) is not None)


_PARTS: dict[str, Callable[[Any], bool]] = {
    "rows_done": _is_count,
    "texts_done": _is_count,
    "num_texts": _is_count,
    "stack": _is_text,
    "pooling": _is_text,
    "proof": _is_text,
    "layers": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "widths": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "dtype": _is_dtype,
    "made_from": lambda value: isinstance(value, dict),
}
"""What an index holds, and what each part of it looks like."""


def _flat(index: Mapping[str, Any]) -> dict[str, Any]:
    """What an index says it was made from, beside the rest."""
    sources: dict[str, Any] = index["made_from"]
    return {k: v for k, v in index.items() if k != "made_from"} | sources


def _map(path: Path, dtype: np.dtype[Any], num_rows: int, *width: int) -> npt.NDArray[Any]:
    """A file as an array of which nothing is read yet."""
    shape = (num_rows, *width)
    if num_rows == 0:  # there is nothing to map
        return np.empty(shape, dtype)
    try:
        return np.memmap(path, dtype, mode="r", shape=shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(_too_short(path, num_rows)) from error


def _too_short(path: Path, num_rows: int) -> str:
    """The message for a damaged file."""
    return f"{path} is missing or shorter than the {num_rows} rows that {_INDEX} promises: extract anew into another folder"


def _text_of(row: np.void) -> int:
    """The text that a row belongs to."""
    return int(row["text"])
