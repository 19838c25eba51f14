"""Your own JSON lines: a prompt and its completion, a text and its class, or a text alone on each line.

```
{"prompt": "Translate: cheese", "completion": "fromage"}     a text to answer with
{"text": "The film was dull.", "label": "negative"}          a class, as a name or as an index
{"text": "Once upon a time ..."}                             a text to be learnt whole
```

`peftlab.own_files` says which files there may be and how they are split; `task.settings` names the columns. By hub name,
the splits of a data set are read in the same way: `--set task.hub=org/name`.
"""

from __future__ import annotations

from pathlib import Path

from peftlab.data_files import read_json_lines
from peftlab.own_files import OwnFileSettings, load_own
from peftlab.task import Splits

PROMPT = "{source}"
METRICS = ("bleu", "rouge_l")
HUB_FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}

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
    return load_own(
        data_dir, settings or OwnFileSettings(), read_json_lines, suffix=".jsonl", task="jsonl", seed=seed
    )
