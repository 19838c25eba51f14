"""Functions with their descriptions: CodeSearchNet rows as CodeXGLUE publishes them, for the tasks on code.

The folder of a language holds `train.jsonl`, `valid.jsonl` and `test.jsonl` (CodeXGLUE), each also as `.jsonl.gz`, or
CodeSearchNet's own shards, `final/jsonl/{train,valid,test}/*.jsonl.gz`. Where there is no validation file, a tenth of
train becomes it, the same one always: whole repositories; one that has more than a twentieth of the rows is taken file
by file; functions of unknown origin one by one.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftlab.data_files import Record, count_note, keep_apart, read_json_lines
from peftlab.errors import DataError
from peftlab.settings import Settings
from peftlab.task import Example, Splits

NUM_ROWS = {
    "python": {"train": 251_820, "validation": 13_914, "test": 14_918},
    "java": {"train": 164_923, "validation": 5_183, "test": 10_955},
    "javascript": {"train": 58_025, "validation": 3_885, "test": 3_291},
}
"""Rows of CodeXGLUE's cleaned release, by language and split."""
STEMS = {"train": ("train",), "validation": ("valid", "validation", "dev"), "test": ("test",)}
HUB_FILES = {split: f"{stems[0]}.jsonl" for split, stems in STEMS.items()}
MASK = "<mask>"
"""What stands for a token that a cloze test asks for."""
_VALIDATION_FRACTION = 0.1
_LARGEST_REPOSITORY = 0.05
_SUFFIXES = (".jsonl", ".jsonl.gz")


class CodeSettings(Settings):
    """Which programming language."""

    language: Literal["python", "java", "javascript"] = "python"
    """Language of the functions: python, java or javascript."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function with its description.

    Attributes:
        tokens: Its code without comments of documentation, tokens with a space between.
        description: The first paragraph of its documentation, tokens with a space between.
        code: Its source text without documentation; None where it cannot be had.
        repository: Where it is from, "" where that is not known.
        path: The file in the repository.
    """

    tokens: str
    description: str
    code: str | None
    repository: str
    path: str


def load_functions(
    data_dir: Path | None,
    settings: CodeSettings,
    example_of: Callable[[Function], tuple[str, str] | None],
    *,
    task: str,
    left_out: str,
) -> Splits:
    """The splits of a task on functions.

    Args:
        data_dir: The folder that holds a folder for each language, or the files of one language.
        settings: Which language.
        example_of: From a function to source and reference; None leaves it out.
        task: The task's name, for messages.
        left_out: Why functions are left out, for the note.

    Returns:
        The splits: equal sources are one example with all their references; a function whose code or description also
        stands in test is dropped from the others, one that stands in validation from train.

    Raises:
        DataError: No folder was given, it lacks a file, or a row is malformed.
    """
    folder = _language_folder(data_dir, settings.language, task)
    files = {split: _find(folder, split) for split in STEMS}
    for split in ("train", "test"):
        if not files[split]:
            raise DataError(f"{folder} holds no {split} split; {_expected(settings.language)}")
    notes: list[str] = []
    found = {split: _functions(paths, settings.language) for split, paths in files.items()}
    for split, functions in found.items():
        if files[split]:
            pairs = [(f.tokens, f.description) for f in functions]
            published = NUM_ROWS[settings.language][split]
            notes += count_note(split, len(pairs), published, len(pairs) - len(set(pairs)))
    if not files["validation"]:
        found["train"], found["validation"] = _hold_out(found["train"])
        notes.append(
            f"validation: no file, so {len(found['validation']):,} functions of train, whole repositories or files"
        )
    chosen = {}
    for split, functions in found.items():
        pairs_of = [(function, example_of(function)) for function in functions]
        chosen[split] = [(function, pair) for function, pair in pairs_of if pair is not None]
        if len(chosen[split]) < len(functions):
            notes.append(f"{split}: functions left out, {left_out}: {len(functions) - len(chosen[split]):,}")
    kept, told = _apart(chosen)
    splits = {split: _group(split, [pair for _, pair in pairs]) for split, pairs in kept.items()}
    paths = tuple(path for split in STEMS for path in files[split])
    return Splits(splits["train"], splits["validation"], splits["test"], files=paths, notes=(*notes, *told))


def _expected(language: str) -> str:
    return (
        f"expected {language}/train.jsonl, valid.jsonl and test.jsonl (or .jsonl.gz) as CodeXGLUE publishes them, or"
        f" {language}/final/jsonl/train/*.jsonl.gz and so on as CodeSearchNet does"
    )


def _language_folder(data_dir: Path | None, language: str, task: str) -> Path:
    """The folder of one language."""
    if data_dir is None:
        raise DataError(
            f"the task {task} reads files: give their folder with --data-dir; {_expected(language)}"
        )
    if not data_dir.is_dir():
        raise DataError(f"{data_dir} is not a folder; {_expected(language)}")
    if (data_dir / language).is_dir():
        return data_dir / language
    if _find(data_dir, "train"):
        return data_dir
    others = [name for name in NUM_ROWS if (data_dir / name).is_dir()]
    there = f"it has {', '.join(others)} (task.settings.language); " if others else ""
    raise DataError(f"{data_dir} holds no {language} functions; {there}{_expected(language)}")


def _find(folder: Path, split: str) -> list[Path]:
    """The files of one split, in order; none where there is none."""
    single = [folder / f"{stem}{suffix}" for stem in STEMS[split] for suffix in _SUFFIXES]
    there = [path for path in single if path.is_file()]
    if len(there) > 1:
        raise DataError(f"{folder} holds {split} twice: {', '.join(p.name for p in there)}; keep one of them")
    for stem in STEMS[split]:
        for shards in (folder / "final" / "jsonl" / stem, folder / stem):
            there = there or sorted(p for p in shards.glob("*") if p.name.endswith(_SUFFIXES))
    return there


def _functions(paths: Sequence[Path], language: str) -> list[Function]:
    """The functions of one split."""
    functions = [_function(record, language) for path in paths for record in read_json_lines(path)]
    if paths and not functions:
        raise DataError(f"{paths[0]}: the split is empty; take the upstream file")
    return functions


def _function(record: Record, language: str) -> Function:
    """One row."""
    said = record.values.get("language", language)
    if said != language:
        raise DataError(
            f"{record.where}: a function in {said!r}, but {language} is asked for; set task.settings.language, or give"
            " the folder that holds a folder for each language"
        )
    tokens, words = (_joined(record, key) for key in ("code_tokens", "docstring_tokens"))
    code = record.values.get("code")
    if code is not None and not isinstance(code, str):
        raise DataError(f"{record.where}: 'code' must be a text, got {type(code).__name__}")
    if code is not None and language == "python":
        code = without_docstring(code)
    repository, path = (str(record.values.get(key) or "") for key in ("repo", "path"))
    return Function(tokens, words, code, repository, path)


def _joined(record: Record, key: str) -> str:
    """A list of tokens as CodeXGLUE's models read it: a space between, no line breaks."""
    tokens: Any = record.values.get(key)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        found = ", ".join(map(str, record.values)) or "nothing"
        raise DataError(f"{record.where}: '{key}' must be a list of texts; the row has: {found}")
    text = " ".join(" ".join(tokens).split())
    if not text:
        raise DataError(f"{record.where}: '{key}' is empty; take the row out or fill it")
    return text


def without_docstring(code: str) -> str | None:
    r'''A Python function without its docstring.

    Args:
        code: The source text of one function.

    Returns:
        The text without the docstring's lines; None where it is no Python 3, has nothing but a docstring, or holds the
        docstring and code on one line.

    Example:
        >>> without_docstring('def f(x):\n    """Twice."""\n    return 2 * x')
        'def f(x):\n    return 2 * x'
    '''
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            (top,) = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    if ast.get_docstring(top, clean=False) is None:
        return code
    text = top.body[0]
    lines = code.split("\n")
    last = text.end_lineno or text.lineno
    alone = not lines[text.lineno - 1][: text.col_offset].strip() and not lines[last - 1].encode()[
        text.end_col_offset or 0 :
    ].strip(b" \t\r")
    if len(top.body) == 1 or not alone:
        return None
    return "\n".join(lines[: text.lineno - 1] + lines[last:])


def _hold_out(functions: Sequence[Function]) -> tuple[list[Function], list[Function]]:
    """Train and a tenth of it for validation, whole groups."""
    rows_of: dict[str, int] = {}
    for function in functions:
        rows_of[function.repository] = rows_of.get(function.repository, 0) + 1

    def group(function: Function) -> tuple[str, str]:
        """What stays together."""
        if not function.repository:
            return "", function.tokens
        large = rows_of[function.repository] > _LARGEST_REPOSITORY * len(functions)
        return function.repository, function.path if large else ""

    sizes: dict[tuple[str, str], int] = {}
    for function in functions:
        sizes[group(function)] = sizes.get(group(function), 0) + 1
    order = sorted(
        sizes, key=lambda key: hashlib.sha256("\x1f".join(key).encode("utf-8", "replace")).digest()
    )
    chosen: set[tuple[str, str]] = set()
    wanted, taken = max(1, round(_VALIDATION_FRACTION * len(functions))), 0
    for key in order:
        if taken + sizes[key] <= wanted or not chosen:
            chosen.add(key)
            taken += sizes[key]
    train = [function for function in functions if group(function) not in chosen]
    return train, [function for function in functions if group(function) in chosen]


Pair = tuple[Function, tuple[str, str]]


def _apart(chosen: Mapping[str, Sequence[Pair]]) -> tuple[dict[str, list[Pair]], list[str]]:
    """Splits that share neither code nor descriptions."""
    notes: list[str] = []
    left = {split: list(pairs) for split, pairs in chosen.items()}
    for what, name in (("tokens", "functions"), ("description", "descriptions")):
        keyed = {
            split: [(getattr(pair[0], what), Example(str(number), "")) for number, pair in enumerate(pairs)]
            for split, pairs in left.items()
        }
        kept, told = keep_apart(keyed, what=name)
        left = {split: [left[split][int(example.id)] for example in kept[split]] for split in left}
        notes += told
    return left, notes


def _group(split: str, pairs: Sequence[tuple[str, str]]) -> tuple[Example, ...]:
    """One example for each source, with all its references."""
    texts: dict[str, dict[str, None]] = {}
    for source, reference in pairs:
        texts.setdefault(source, {})[reference] = None
    return tuple(
        Example(f"{split}-{index}", source, tuple(references))
        for index, (source, references) in enumerate(texts.items())
    )
