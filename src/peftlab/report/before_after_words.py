"""What is said beside each measure of base against tuned model: how to read it, where it misleads, why it is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

NAMES = {"task": "the task's own rows", "given": "the given texts", "general": "general text"}
"""Kind of passages to what a person calls it."""

MEASURES: dict[str, tuple[str, str]] = {
    "loss": (
        "Mean negative log probability of the next token; a positive difference on general text is forgetting, measured on"
        " the same passages for both. On the task's rows only the answers count.",
        "It holds for this text alone: other text may be forgotten more, and few short passages give a wide interval.",
    ),
    "ratio": (
        "How large the change is beside the weight it was added to, by Frobenius norms: 1 % is a light touch, 50 % another"
        " layer.",
        "A small change in a direction that the inputs have much of moves the output more than a large one in a direction"
        " that they do not have.",
    ),
    "ranks": (
        "The spectral norm is the most that the change can stretch an input; the stable rank (Frobenius over spectral norm,"
        " squared) and the effective rank (exp of the entropy of the singular values) say how many directions carry it.",
        "They are bounded by the rank of A and B, so a low one says little where the rank was set low; alpha and the scale"
        " are in the norms.",
    ),
    "intruders": (
        "New leading directions that the base's weight does not have: Shuttleworth et al. found them with LoRA, seldom with"
        " full fine-tuning, and the models that have them forget more.",
        "The count depends on the number of vectors looked at and on the bound; in weights with singular values close to"
        " each other vectors turn into each other without being new, and small weights have few vectors to be close to.",
    ),
    "drift": (
        "How far a token's state has moved, as a share of its length: where the line rises, the fine-tuning works.",
        "The first token of most models has a state of its own kind, hundreds of times longer than the others', whose drift"
        " says nothing of theirs: the solid line leaves it out. Later layers also carry on what earlier ones moved.",
    ),
    "cosine": (
        "1: the state has kept its direction; what is below has turned, whatever its length.",
        "A few very large dimensions decide a cosine alone, so states can look alike that differ in all other dimensions.",
    ),
    "cka": (
        "1 on the diagonal: the layer sees the same likenesses between tokens as before, up to rotation and scale; a layer"
        " that is more like another layer of the base than like itself has changed its place.",
        "CKA needs many tokens: without the correction that is made here few tokens look alike by chance alone, and one"
        " dimension of large variance decides it, so it is also given without the largest.",
    ),
    "kl": (
        "How differently base and tuned model would go on, were this the last layer: it grows where the decision changes.",
        "KL weighs what the base held likely; what the tuned model newly says counts little. Early layers are read through a"
        " norm and a head that were made for the last one.",
    ),
    "lens": (
        "The loss that each layer's state has when it is read through the final norm and the head: where it falls, the"
        " answer is formed.",
        "The lens is not calibrated in early layers, whose states are not yet in the head's coordinates: compare base with"
        " tuned, not layer with layer.",
    ),
    "attention": (
        "How differently a head looks, mean over queries: 0 the same; total variation 1, or Jensen-Shannon ln 2 = 0.69,"
        " means nothing in common.",
        "Heads that rest on the first token hardly move, whatever they do when they do not rest; and a head can look alike"
        " and carry something else in its values.",
    ),
}
"""Measure to one sentence on how to read it, and its trap."""


def _no_lens(document: Mapping[str, Any]) -> str:
    """Why there is no lens."""
    if document["head"] == "classification":
        return (
            "Not computed: the model ends in classes, whose head reads one token of a text, so no layer's token says"
            " anything."
        )
    return _noted(document, "logit lens")


def _no_loss(document: Mapping[str, Any]) -> str:
    """Why there is no loss."""
    if document["head"] == "classification":
        return "Not computed: a classifier says no tokens; its scores before and after are in the evaluation."
    if document["head"] == "seq2seq":
        return "Not computed on general text: the decoder says answers, and general text is the answer to nothing."
    return _noted(document, "logit lens")


def _noted(document: Mapping[str, Any], words: str) -> str:
    """What the notes say of something."""
    found = [note for note in document["notes"] if words in note]
    return "Not computed: " + ("; ".join(found) or "the reasons are below, under what was not measured") + "."


ABSENT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "lens": _no_lens,
    "loss": _no_loss,
    "attention": lambda document: _noted(document, "attention"),
    "weights": lambda document: (
        f"No weight of the base has moved: {document['method']} adds what it trains beside them."
    ),
}
"""Measure to what is said where it is not there."""


def absent_reason(document: Mapping[str, Any], measure: str) -> str:
    """Why a measure is not there.

    Args:
        document: What was measured.
        measure: Its name in `ABSENT`.

    Returns:
        HTML.
    """
    return f'<p class="absent">{escape(ABSENT[measure](document))}</p>'


def told(measure: str) -> str:
    """How to read a measure, and its trap.

    Args:
        measure: Its name in `MEASURES`.

    Returns:
        HTML.
    """
    reading, trap = MEASURES[measure]
    return f"<p><b>How to read it.</b> {escape(reading)} <b>The trap.</b> {escape(trap)}</p>"
