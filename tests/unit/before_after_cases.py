"""Adapters on tiny models for the comparison of base and tuned model, and both sides as two models of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import tiny_bundles
import tiny_models
from peftlab.catalog import METHODS
from peftlab.inspection.before_after.passages import PassageReader, Passages
from peftlab.inspection.before_after.sides import Sides
from peftlab.inspection.before_after.surveying import _StackSurvey
from peftlab.mapping import map_model

TEXTS = (
    "the cat sits on the mat",
    "a dog runs under the big tree and flies",
    "a red bird",
    "the house is small and low",
)


def attached(
    model: str, method: str = "lora", *, num_layers: int = 3, double: bool = True, **settings: Any
) -> Any:
    """An adapter that is not where it starts, on a tiny base in float64."""
    leaf = METHODS.load(method)
    base = tiny_models.build(model, num_layers)
    base = base.double() if double else base
    made = leaf.attach(
        base, map_model(base), leaf.Settings(**settings), head=tiny_models.HEADS[model], seed=3
    )
    tiny_bundles.fill(made.parameters())
    if double:
        made.model.double()
    made.model.eval()
    return made


def tokenizer(model: str) -> Any:
    head = tiny_models.HEADS[model]
    return tiny_models.tokenizer(opens=head == "causal", closes=head != "causal")


def reader(attachment: Any, model: str) -> PassageReader:
    return PassageReader(attachment.model, tokenizer(model), tiny_models.HEADS[model])


def passages(attachment: Any, model: str, texts: Sequence[str] = TEXTS) -> Passages:
    return reader(attachment, model).of_texts("given", "texts of a test", texts)


def survey(attachment: Any, model: str, *, stack: str | None = None, texts: Sequence[str] = TEXTS) -> Any:
    """One stack's values, its loss, and the notes."""
    sides, notes = Sides(attachment), []
    stack = stack or next(iter(sides.base_family.stacks))
    made = _StackSurvey(
        sides,
        reader(attachment, model),
        passages(attachment, model, texts),
        stack,
        decoder=stack == "decoder",
    )
    return made.run(notes), made.loss(), notes, sides


def apart(attachment: Any, model: str, *, num_layers: int = 3) -> tuple[Any, Any]:
    """The base loaded on its own, and the tuned model with peft's adapter merged into a copy."""
    base = tiny_models.build(model, num_layers).double()
    return base, copy.deepcopy(attachment.model).merge_and_unload().eval()


@torch.no_grad()
def seen_alone(model: Any, blocks: Sequence[Any], ids: Sequence[int]) -> dict[str, Any]:
    """What one text does in one model: states of every block, logits, attention."""
    states: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: states.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for block in blocks
    ]
    model.set_attn_implementation("eager")
    output = model(input_ids=torch.tensor([list(ids)]), output_attentions=True)
    for hook in hooks:
        hook.remove()
    return {
        "states": [state[0].double().numpy() for state in states],
        "logits": output.logits[0].double().numpy(),
        "attention": [rows[0].double().numpy() for rows in output.attentions],
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
