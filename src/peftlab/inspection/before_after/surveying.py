"""All that is measured of base against tuned model, as plain values for a page and its files.

Passages stream by in batches: of each batch the states of every layer are held at once, of all batches only sums, a sample
of tokens for CKA, and a loss for each passage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.config import RunConfig, build_config
from peftlab.errors import DataError, EvaluationError, InputError, ModelError
from peftlab.files import read_yaml
from peftlab.inspection.attention_choice import Kind, mixers
from peftlab.inspection.before_after.attention_drift import AttentionDrift
from peftlab.inspection.before_after.lens import LENS_COLUMNS, Lens, LensSums, passage_losses
from peftlab.inspection.before_after.passages import (
    Batch,
    PassageReader,
    Passages,
    is_padding_harmless,
)
from peftlab.inspection.before_after.sides import OUTPUT, Sides
from peftlab.inspection.before_after.token_sums import TokenSample, TokenSums, diagonal
from peftlab.inspection.before_after.weight_change import CLOSE, TOP_VECTORS, weight_changes
from peftlab.inspection.block_outputs import reads_target
from peftlab.inspection.readings import text_stacks
from peftlab.inspection.subject import Subject
from peftlab.method import Attachment, Head
from peftlab.run import RunFolder
from peftlab.significance import paired_bootstrap

_ATTENTION_PASSAGES = 16
"""Passages whose attention is looked at: it costs a pass of its own."""
_SEED = 0


def survey_before_after(
    attachment: Attachment, subject: Subject, *, texts: Sequence[str] = (), general_text: Path | None = None
) -> dict[str, Any]:
    """Measure base against tuned model.

    Args:
        attachment: The subject's adapter on its base, with weights; it is left as it was.
        subject: What is looked into.
        texts: What is read beside general text; empty takes test rows of the run's own task.
        general_text: General text, one passage a line; None takes peftlab's own.

    Returns:
        Plain values: how both were run, one entry for each kind of passages, the modules' changes, and notes.

    Raises:
        DataError: The general text or a given one cannot be read.
        ModelError: The blocks of base and tuned model cannot be told apart.
    """
    manifest = subject.manifest or {}
    head: Head = manifest["head"]
    sides = Sides(attachment)
    reader = PassageReader(attachment.model, subject.tokenizer, head)
    notes: list[str] = []
    kinds = _passages(reader, subject, texts, general_text, notes)
    measured = [_measure(sides, reader, passages, notes) for passages in kinds]
    added = {stack: sides.layers(stack).added for stack in sides.base_family.stacks}
    changes = weight_changes(attachment, sides.tuned_family, added=added)
    found: dict[str, Any] = _plain(
        {
            "name": subject.name,
            "base": subject.settings.name,
            "method": manifest["method"],
            "head": head,
            "passes": sides.num_passes,
            "why_two_passes": sides.note,
            "added": {stack: list(layers) for stack, layers in added.items() if layers},
            "passages": measured,
            "modules": [asdict(change) for change in changes],
            "intruders": {"top": TOP_VECTORS, "below": CLOSE},
            "notes": list(dict.fromkeys(notes)),
        }
    )
    return found


def _plain(value: Any) -> Any:
    """The same for JSON: None for what is no finite number."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _passages(
    reader: PassageReader, subject: Subject, texts: Sequence[str], general_text: Path | None, notes: list[str]
) -> list[Passages]:
    """What is read."""
    found: list[Passages] = []
    if texts:
        found.append(reader.of_texts("given", f"{len(texts)} texts given with --text", texts))
    else:
        config = _config(subject)
        if config is None:
            notes.append(
                "rows of its own task are not read: a bundle without its run does not say where the data lie"
            )
        else:
            try:
                found.append(reader.of_task(config))
            except (DataError, InputError) as error:
                notes.append(f"rows of its own task are not read: {error}")
    return [*found, reader.general(subject.settings.name, general_text)]


def _config(subject: Subject) -> RunConfig | None:
    """The config of the run that a bundle is the end of; None where it lies alone."""
    path = None if subject.bundle is None else subject.bundle.parent / RunFolder.CONFIG
    return build_config(read_yaml(path)) if path is not None and path.is_file() else None


def _measure(sides: Sides, reader: PassageReader, passages: Passages, notes: list[str]) -> dict[str, Any]:
    """Everything of one kind of passages, stack by stack."""
    stacks, loss = [], None
    for stack in text_stacks(sides.tuned, sides.tuned_family):
        decoder = reads_target(sides.tuned, sides.tuned_family, stack)
        if decoder and reader.head != "seq2seq":
            notes.append(f"the {stack} is not looked at: it reads what the model makes of the text itself")
            continue
        try:
            survey = _StackSurvey(sides, reader, passages, stack, decoder=decoder)
            stacks.append(survey.run(notes))
            loss = survey.loss() or loss
        except (ModelError, EvaluationError) as error:
            notes.append(f"{passages.name} passages through the {stack}: {error}")
    return {
        "name": passages.name,
        "told": passages.told,
        "passages": len(passages.rows),
        "tokens": sum(len(row.source) for row in passages.rows),
        "stacks": stacks,
        "loss": loss,
    }


class _StackSurvey:
    """One stack on one kind of passages.

    Args:
        sides: Both sides.
        reader: Makes batches.
        passages: The passages.
        stack: The stack.
        decoder: Whether it is the decoder beside an encoder.
    """

    def __init__(
        self, sides: Sides, reader: PassageReader, passages: Passages, stack: str, *, decoder: bool
    ) -> None:
        self.sides, self.reader, self.passages = sides, reader, passages
        self.stack, self.decoder = stack, decoder
        self.layers = list(sides.layers(stack).pairs)
        self.lengths = [len(row.read if decoder else row.source) for row in passages.rows]
        first = reader.one_batch(passages, [0, len(passages.rows) - 1], decoder=decoder)
        sides.prove(stack, first.inputs, first.width)
        self.padded = is_padding_harmless(sides, reader, passages, stack, decoder=decoder)
        self.losses: dict[int, tuple[float, float, int]] = {}
        self.first = first

    def run(self, notes: list[str]) -> dict[str, Any]:
        """Measure.

        Args:
            notes: Is told what could not be measured.

        Returns:
            The stack's values.
        """
        base, _ = states = self.sides.hidden_states(self.stack, self.first.inputs, self.first.width)
        sums = TokenSums(self.layers)
        sample = TokenSample(self.lengths, self.layers, base[OUTPUT].shape[-1])
        lens = self._lens(states, notes)
        lens_sums = LensSums(lens, [*self.layers, OUTPUT]) if lens else None
        for batch in self._batches():
            base, tuned = self.sides.hidden_states(self.stack, batch.inputs, batch.width)
            sums.add(base, tuned, batch.real)
            sample.add(base, tuned, batch)
            if lens is not None and lens_sums is not None:
                lens_sums.add(base, tuned, batch)
                self.losses |= dict(passage_losses(lens, base[OUTPUT], tuned[OUTPUT], batch))
        similarity = sample.similarity()
        seen = lens_sums.means() if lens_sums else {}
        means = sums.means()
        rows = [
            {
                "layer": layer,
                "tuned_layer": self.sides.layers(self.stack).pairs[layer],
                **means[layer],
                **seen.get(layer, {}),
            }
            for layer in self.layers
        ]
        for name in ("all_dimensions", "without_top"):
            for row, value in zip(rows, diagonal(similarity, name), strict=False):
                row[f"cka_{name}"] = value
        return {
            "stack": self.stack,
            "tokens": sum(self.lengths),
            "layers": rows,
            "output": seen.get(OUTPUT),
            "lens_tokens": lens_sums.tokens if lens_sums else 0,
            "lens_columns": LENS_COLUMNS,
            "similarity": similarity,
            "attention": self._attention(notes),
        }

    def loss(self) -> dict[str, Any] | None:
        """The loss of both sides over the passages, and their difference.

        Returns:
            base, tuned, difference (nats per token), interval, p_value, test, passages, tokens; None where nothing is said.
        """
        said = [found for _, found in sorted(self.losses.items()) if found[2]]
        if len(said) < 2:
            return None
        table = np.array(said, dtype=float)
        base, tuned = table[:, [0, 2]], table[:, [1, 2]]
        found = paired_bootstrap(base, tuned, seed=_SEED, value_of=lambda total: float(total[0] / total[1]))
        tokens = table[:, 2].sum()
        return {
            "base": float(table[:, 0].sum() / tokens),
            "tuned": float(table[:, 1].sum() / tokens),
            "difference": found.value,
            "interval": list(found.interval) if found.interval else None,
            "p_value": found.p_value,
            "test": found.test,
            "passages": len(said),
            "tokens": int(tokens),
        }

    def _batches(self) -> Any:
        """The passages, batch after batch."""
        return self.reader.batches(self.passages, decoder=self.decoder, padded=self.padded)

    def _lens(self, states: Any, notes: list[str]) -> Lens | None:
        """The lens where the stack speaks and it is proved."""
        if self.reader.head == "classification":
            notes.append("no logit lens: the model ends in classes, whose head reads one token of a text")
            return None
        if self.reader.head == "seq2seq" and not self.decoder:
            return None
        try:
            lens = Lens(self.sides, self.stack)
            lens.prove(self.first, *states)
        except ModelError as error:
            notes.append(f"no logit lens on the {self.stack}: {error}")
            return None
        return lens

    def _attention(self, notes: list[str]) -> list[dict[str, Any]]:
        """How every head's attention has moved, on some of the passages."""
        count = len(self.passages.rows)
        chosen = sorted(
            {round(i * (count - 1) / (_ATTENTION_PASSAGES - 1)) for i in range(_ATTENTION_PASSAGES)}
        )
        found: list[dict[str, Any]] = []
        kinds: tuple[Kind, Kind] = ("self", "cross")
        for kind in kinds:
            if not mixers(self.sides.base_family, self.stack, kind):
                continue
            try:
                drift = AttentionDrift(self.sides, self.stack, kind)
                for batch in self._few(chosen):
                    drift.add(batch)
            except (ModelError, EvaluationError) as error:
                notes.append(f"{kind} attention of the {self.stack}: {error}")
                continue
            found.append(
                {
                    "kind": kind,
                    "passages": len(chosen),
                    "queries": drift.queries,
                    "source": drift.source,
                    "note": drift.note,
                    "layers": drift.means(),
                }
            )
        return found

    def _few(self, chosen: list[int]) -> list[Batch]:
        """Chosen passages in small batches."""
        size = 4 if self.padded else 1
        ordered = sorted(chosen, key=lambda i: self.lengths[i])
        groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        return [self.reader.one_batch(self.passages, group, decoder=self.decoder) for group in groups]
