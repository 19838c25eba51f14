"""Your own rows, given from Python or as one file `rows.jsonl`.

Rows are mappings, all of one of two shapes:

```
{"prompt": "Translate: cheese", "completion": "fromage"}     a text to answer with
{"text": "The film was dull.", "label": "negative"}          a class, as a name or as an index
```

String labels are numbered in sorted order; `labels_of` gives the class names in the order of their indices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peftlab.data_files import read_json_lines
from peftlab.errors import DataError
from peftlab.own_rows import SHAPES as SHAPES
from peftlab.own_rows import Row as Row
from peftlab.own_rows import from_rows as from_rows
from peftlab.own_rows import labels_of as labels_of
from peftlab.task import Splits

PROMPT = "{source}"
METRICS = ("bleu", "rouge_l")
FILE = "rows.jsonl"


def load(data_dir: Path | None, *, seed: int) -> Splits:
    """Read `rows.jsonl`, which `peftlab.finetune` writes beside the runs.

    Args:
        data_dir: The folder that holds `rows.jsonl`.
        seed: Seeds the split.

    Returns:
        The splits, as `from_rows` makes them.

    Raises:
        DataError: There is no such file, or a line is malformed; names file and line.
    """
    if data_dir is None:
        raise DataError(
            f"the task 'rows' needs a folder with {FILE}: peftlab.finetune(model, rows) writes one,"
            " or give yours with --data-dir"
        )
    path = data_dir / FILE
    records = list(read_json_lines(path))
    places = [record.where for record in records]
    splits = from_rows([record.values for record in records], seed=seed, places=places)
    return dataclasses.replace(splits, files=(path,))
