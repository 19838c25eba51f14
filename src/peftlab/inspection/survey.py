"""`peftlab inspect`: look into one model, or into two side by side, and write what is seen into a folder.

```
NAME/
  inspection.json      facts, map, certificates, shares, what texts do in it
  arrays/*.npy         norms of every token in every layer, attention of chosen layers word by word
  before_after.json    of a run or a bundle: base against tuned model
  checksums.json       of the above
  plots/*.png  inspection.html    drawn from the above by `report/inspection_page.py`, without torch
  before_after.html  before_after_*.csv    by `report/before_after.py`, of a run or a bundle
```

Of two models there are `a/` and `b/`, each such a folder, and `comparison.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from peftlab.commands.inspecting import DEFAULT_TEXT, InspectRequest
from peftlab.errors import ConfigError, DataError
from peftlab.family import FamilyMap
from peftlab.files import new_folder, write_json
from peftlab.inspection.before_after.surveying import survey_before_after
from peftlab.inspection.blueprint import describe_map
from peftlab.inspection.facts import dtype_of, model_facts, parameter_shares
from peftlab.inspection.readings import Readings, Texts, read_texts, read_words, text_stacks, written_for
from peftlab.inspection.shards import Activations
from peftlab.inspection.similarity import (
    FEWEST,
    TOP_DIMENSIONS,
    chance_level,
    cka_matrix,
    without_top_dimensions,
)
from peftlab.inspection.subject import Subject, find_subject
from peftlab.inspection.text_batches import TextBatches
from peftlab.inspection.training_memory import training_memory
from peftlab.inspection.words import measure_alignment
from peftlab.mapping import map_model
from peftlab.report.before_after import BEFORE_AFTER
from peftlab.report.inspection_page import COMPARISON, INSPECTION, write_inspection_page

_FORMAT = 1
_MOST_WORDS = 512
"""Words that a similarity is taken over: its cost is quadratic in them."""


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """What is kept of one model for a comparison.

    Attributes:
        stack: The stack whose words are compared; "" where there are none.
        words: Its activations, one row for each word.
    """

    stack: str = ""
    words: Activations[Any] | None = None


def inspect_models(request: InspectRequest) -> Path:
    """Look into one model or two and write the page.

    Args:
        request: Which models, texts and layers, and where to.

    Returns:
        `inspection.html` in the new folder.

    Raises:
        ModelError: There is no such model, or it cannot be loaded.
        ConfigError: A layer is out of range, or the device is not there.
        DataError: A text cannot be read, or one is given to a model that reads no text.
        OutputError: The folder cannot be written.
    """
    subjects = [
        find_subject(reference, runs=request.runs, device=request.device) for reference in request.references
    ]
    for subject in subjects:
        _check(subject, request)
    name = "-and-".join(re.sub(r"[^\w.-]+", "-", subject.name).strip("-.") or "model" for subject in subjects)
    folder = _free(request.output.expanduser(), name)
    with new_folder(folder) as aside:
        if len(subjects) == 1:
            _survey(subjects[0], request, aside, with_words=False)
        else:
            parts = [aside / "a", aside / "b"]
            surveyed = [
                _survey(subject, request, part, with_words=bool(request.texts))
                for subject, part in zip(subjects, parts, strict=True)
            ]
            write_json(aside / COMPARISON, _compare(subjects, surveyed))
    return write_inspection_page(folder)


def _check(subject: Subject, request: InspectRequest) -> None:
    """Refuse, before weights are read, layers that are not there and texts that cannot be read."""
    if request.general_text is not None and subject.adapter is None:
        raise ConfigError(
            f"--general_text has no effect on '{subject.reference}': it has no adapter, so nothing was forgotten; name a run"
        )
    structure = subject.structure()
    family = map_model(structure)
    most = max(family.num_outputs(stack) for stack in family.stacks)
    wrong = [layer for layer in request.layers or () if layer >= most]
    if wrong:
        raise ConfigError(
            f"--layers: '{subject.reference}' has no layer {wrong[0]}; its layers are 0 to {most - 1}"
        )
    stacks = text_stacks(structure, family) if subject.tokenizer is not None else []
    if request.texts and not stacks:
        raise DataError(
            f"'{subject.reference}' ({family.model_type}) reads no text; look at its structure alone with --no_text"
        )
    texts = _texts(request)
    for stack in stacks if texts.read else ():
        written = written_for(structure, stack, texts)
        try:
            TextBatches(structure, subject.tokenizer, texts.read, decoder_texts=written).read(
                0, len(texts.read)
            )
        except DataError as error:
            said = str(error).partition(": give max_length")[0]  # which this command has not
            raise DataError(f"'{subject.reference}': {said}; give another --text, or --no_text") from error


def _texts(request: InspectRequest) -> Texts:
    """What the models read."""
    return Texts(request.texts, request.decoder_texts or None, request.layers)


def _free(directory: Path, name: str) -> Path:
    """A folder that is not there yet: the name, or with -2, -3 ... behind it."""
    number = 1
    while (path := directory / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _survey(subject: Subject, request: InspectRequest, folder: Path, *, with_words: bool) -> _Surveyed:
    """Look into one model and fill its folder."""
    (folder / "arrays").mkdir(parents=True)
    attachment = subject.attach() if request.texts and subject.adapter and not with_words else None
    missing: list[str] = []
    if attachment is not None:
        model = attachment.model
    else:
        model, missing = subject.load() if request.texts else (subject.structure(), [])
    family = map_model(model)
    texts = _texts(request)
    seen = read_texts(model, subject.tokenizer, family, texts) if request.texts else Readings()
    if missing:
        seen.notes.append(f"the weights lack {', '.join(missing[:5])}: these tensors are random here")
    document = _document(subject, model, family, seen)
    write_json(folder / INSPECTION, document)
    if attachment is not None:
        given = () if request.texts == (DEFAULT_TEXT,) else request.texts
        found = survey_before_after(attachment, subject, texts=given, general_text=request.general_text)
        write_json(folder / BEFORE_AFTER, found)
    for name, array in seen.arrays.items():
        np.save(folder / "arrays" / f"{name}.npy", array)
    if not (with_words and seen.stacks):
        return _Surveyed()
    return _Surveyed(*read_words(model, subject.tokenizer, family, texts))


def _document(subject: Subject, model: nn.Module, family: FamilyMap, seen: Readings) -> dict[str, Any]:
    """Everything about one model as plain values."""
    tokenizer = subject.tokenizer
    alignment = None if tokenizer is None else measure_alignment(tokenizer)
    return {
        "format": _FORMAT,
        "name": subject.name,
        "reference": subject.reference,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in ("peftlab", "torch", "transformers", "peft")},
        "loaded": bool(seen.stacks or seen.notes),
        "dtype": dtype_of(model),
        "facts": model_facts(model, subject.config, tokenizer, family),
        "adapter": subject.adapter,
        "map": describe_map(model, family),
        "certificates": [certificate.to_json() for certificate in family.certificates],
        "unproven": dict(family.unproven),
        "training_memory": training_memory(subject, family),
        "shares": parameter_shares(model, family, adapted=subject.adapter is not None),
        "words": None if alignment is None else asdict(alignment) | {"rate": alignment.rate},
        "readings": seen.stacks,
        "notes": seen.notes,
    }


def _compare(subjects: Sequence[Subject], surveyed: Sequence[_Surveyed]) -> dict[str, Any]:
    """How alike the layers of two models are, on the words that both read."""
    document: dict[str, Any] = {
        "format": _FORMAT,
        "names": [subject.name for subject in subjects],
        "references": [subject.reference for subject in subjects],
        "stacks": [found.stack for found in surveyed],
        "similarity": None,
        "note": "",
    }
    first, second = (found.words for found in surveyed)
    if first is None or second is None:
        return document | {"note": "no text was read by both models"}
    rows = _shared_words(first, second)
    if len(rows) < FEWEST:
        return document | {
            "note": f"both models read {len(rows)} words; a similarity needs {FEWEST} at least"
        }
    layers = [_rows(found, rows[:, place]) for place, found in enumerate((first, second))]
    cut = [[without_top_dimensions(layer) for layer in side] for side in layers]
    return document | {
        "similarity": {
            "words": len(rows),
            "all_dimensions": _plain(cka_matrix(*layers)),
            "chance": chance_level(*layers),
            "without_top": _plain(cka_matrix(*cut)),
            "chance_without_top": chance_level(*cut),
            "left_out": TOP_DIMENSIONS,
        }
    }


def _shared_words(first: Activations[Any], second: Activations[Any]) -> npt.NDArray[np.int64]:
    """Rows of both of the words that both have, (words, 2); at most `_MOST_WORDS` of them, evenly spread."""
    places = [
        {
            (text, word): row
            for row, (text, word) in enumerate(zip(found.rows["text"], found.rows["word"], strict=True))
        }
        for found in (first, second)
    ]
    rows = np.array([(row, places[1][key]) for key, row in places[0].items() if key in places[1]], np.int64)
    if len(rows) > _MOST_WORDS:
        rows = rows[np.linspace(0, len(rows) - 1, _MOST_WORDS).round().astype(np.int64)]
    return rows.reshape(-1, 2)


def _rows(found: Activations[Any], rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.floating]]:
    """Chosen rows of every layer."""
    return [found[layer].float().numpy()[rows] for layer in found]


def _plain(matrix: npt.NDArray[np.float64]) -> list[list[float | None]]:
    """A matrix for JSON; None where a layer does not vary."""
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]
