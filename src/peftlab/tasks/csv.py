"""Your own CSV files with a header: a prompt and its completion, a text and its class, or a text alone in each row.

```
prompt,completion                      text,label
"Translate: cheese",fromage            "The film was dull.",negative
```

`peftlab.own_files` says which files there may be and how they are split; `task.settings` names the columns, which are
compared in lower case.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peftlab.data_files import Record, read_csv
from peftlab.own_files import OwnFileSettings, load_own
from peftlab.task import Splits

PROMPT = "{source}"
METRICS = ("bleu", "rouge_l")
HUB_FILES = {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}

Settings = OwnFileSettings


def load(data_dir: Path | None, *, seed: int, settings: OwnFileSettings | None = None) -> Splits:
    """Read your files.

    Args:
        data_dir: The folder that holds them.
        seed: Seeds the split of what has no file of its own.
        settings: Columns and fractions; the usual ones where None.

    Returns:
        The splits; class names of label rows in sorted order.

    Raises:
        DataError: A file is missing, empty or malformed; names file and line.
    """
    asked = settings or OwnFileSettings()
    names = {key: getattr(asked, key).lower() for key in ("prompt", "completion", "text", "label")}
    return load_own(data_dir, asked.model_copy(update=names), _rows, suffix=".csv", task="csv", seed=seed)


def _rows(path: Path) -> Iterable[Record]:
    """The rows of a file, whatever its columns."""
    return read_csv(path, ())
