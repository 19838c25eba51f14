"""Tasks that contradict each other: the same meanings of the embedded task, and another answer to each in every task.

One set of weights cannot answer two of them, as nothing in the prompt says which is asked: whatever is shared must forget.
Answers of the first three have to be made of the source's values; the last two are short, and learned in a few steps.

```
source     name[The Mill], eatType[pub], food[Thai], area[park]
sentence   The Mill is a Thai pub in the park area.       as the embedded task has it
backwards  park, Thai, pub, The Mill
sorted     area park; eatType pub; food Thai; name The Mill
praise     A pub, never closed.
denial     No pub but a cinema.
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peftlab.catalog import TASKS
from peftlab.errors import UnknownNameError
from peftlab.files import write_text
from peftlab.task import Example, Splits, render_prompt

SIZES = {"train": 400, "validation": 32, "test": 100}


def values_of(source: str) -> dict[str, str]:
    """Attributes and values of a meaning.

    Args:
        source: As the embedded task writes it.

    Returns:
        Attribute to value, in their order.

    Example:
        >>> values_of("name[The Mill], food[Thai]")
        {'name': 'The Mill', 'food': 'Thai'}
    """
    parts = (part.rstrip("]").partition("[") for part in source.split("], "))
    return {key: value for key, _, value in parts}


ANSWERS: dict[str, Callable[[Example], str]] = {
    "sentence": lambda example: example.references[0],
    "backwards": lambda example: ", ".join(reversed(values_of(example.source).values())),
    "sorted": lambda example: "; ".join(" ".join(pair) for pair in sorted(values_of(example.source).items())),
    "praise": lambda example: f"A {values_of(example.source)['eatType']}, never closed.",
    "denial": lambda example: f"No {values_of(example.source)['eatType']} but a cinema.",
}
"""Task to its answer to an example of the embedded task."""


def write_fixture(labels: Sequence[str], folder: Path) -> dict[str, Path]:
    """Write tasks as files of JSON lines.

    Args:
        labels: Which tasks.
        folder: Where each has a folder; files that are there with the same content stay.

    Returns:
        Label to folder.

    Raises:
        UnknownNameError: There is no such task.
        OutputError: They cannot be written.
    """
    for label in labels:
        if label not in ANSWERS:
            raise UnknownNameError("task that contradicts others", label, list(ANSWERS))
    embedded = TASKS.load("embedded")
    splits: Splits = embedded.load(None, seed=0)
    parts: Mapping[str, Sequence[Example]] = {
        name: getattr(splits, name)[:count] for name, count in SIZES.items()
    }
    made = {}
    for label in labels:
        made[label] = folder / label
        made[label].mkdir(parents=True, exist_ok=True)
        for name, examples in parts.items():
            lines = [
                {
                    "prompt": render_prompt(embedded.PROMPT, example.source),
                    "completion": ANSWERS[label](example),
                }
                for example in examples
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path = made[label] / f"{name}.jsonl"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
    return made
