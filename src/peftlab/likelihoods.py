"""How likely a model finds an answer, and which of a few answers it finds the most likely.

An answer is scored as training sees it: its tokens and the end of sequence behind the task's prompt, so that the number is
the probability of just this answer, a long one not helped by its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftlab.batches import IGNORED, Collator, Row, RowBuilder
from peftlab.errors import EvaluationError
from peftlab.method import Head
from peftlab.task import Example


def log_likelihoods(
    model: Any, rows: Sequence[Row], *, pad_id: int, head: Head, batch_size: int
) -> list[float]:
    r"""The log-likelihood of each row's answer, $\sum_t \log p(y_t | y_{<t}, x)$.

    Args:
        model: A causal or sequence-to-sequence model.
        rows: Rows from `RowBuilder.build`.
        pad_id: Token that fills.
        head: "causal" or "seq2seq".
        batch_size: Rows computed together.

    Returns:
        In nats, one number for each row, computed in float32 or better.
    """
    collate = Collator(pad_id, head)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = {
            name: tensor.to(device) for name, tensor in collate(rows[start : start + batch_size]).items()
        }
        with torch.inference_mode():
            logits, labels = model(**batch).logits, batch["labels"]
        logits = logits[:, -labels.shape[1] :]  # without the virtual tokens that some adapters put in front
        if head == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32)),
            labels,
            ignore_index=IGNORED,
            reduction="none",
        )
        found += (-losses.sum(dim=1)).tolist()
    model.train(was_training)
    return found


def compare_answers(
    model: Any,
    builder: RowBuilder,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    batch_size: int,
) -> list[list[float]]:
    """How likely a model finds each of a few answers, for each example.

    Args:
        model: A causal or sequence-to-sequence model.
        builder: Makes the rows: its tokenizer, prompt and length are those of training.
        examples: What is asked.
        answers: What may be answered.
        batch_size: Rows computed together; each example has one for each answer.

    Returns:
        For each example the probability of each answer among them, in 0-1; an example's sum to 1. All of them follow one
        prompt, cut for the longest where it would not fit.

    Raises:
        EvaluationError: A prompt and an answer do not fit the builder's length, or a logit is not finite.
    """
    asked = [Example(example.id, example.source, tuple(answers)) for example in examples]
    rows, count = builder.build(asked, one_prompt=True)
    if len(rows) != len(examples) * len(answers):
        why = "; ".join(f"{reason}: {number}" for reason, number in count.dropped.items())
        raise EvaluationError(
            f"the answers {', '.join(answers)} cannot be compared ({why}); raise task.max_length"
        )
    pad_id = builder.tokenizer.pad_token_id
    numbers = log_likelihoods(model, rows, pad_id=pad_id, head=builder.head, batch_size=batch_size)
    found = torch.tensor(numbers, dtype=torch.float64).view(-1, len(answers))
    return _checked(found.softmax(dim=-1))


def most_likely(
    model: Any,
    builder: RowBuilder,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    batch_size: int,
) -> list[str]:
    """The answer of a few that a model finds the most likely, for each example.

    Args:
        model: A causal or sequence-to-sequence model.
        builder: Makes the rows: its tokenizer, prompt and length are those of training.
        examples: What is asked.
        answers: What may be answered; of two that are equally likely the first is taken.
        batch_size: Rows computed together; each example has one for each answer.

    Returns:
        One of `answers` for each example.

    Raises:
        EvaluationError: A prompt and an answer do not fit the builder's length, or a logit is not finite.
    """
    groups = compare_answers(model, builder, examples, answers, batch_size=batch_size)
    return [answers[group.index(max(group))] for group in groups]


def class_probabilities(
    model: Any, prompts: Sequence[list[int]], *, pad_id: int, batch_size: int
) -> list[list[float]]:
    """How likely a classifier finds each class.

    Args:
        model: A sequence-classification model.
        prompts: Token rows.
        pad_id: Token that fills.
        batch_size: Rows classified together.

    Returns:
        For each row the probability of each class, in 0-1, computed in float32 or better. The first of the largest is
        the class of the largest logit.

    Raises:
        EvaluationError: A logit is not finite.
    """
    collate = Collator(pad_id, "classification")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: list[list[float]] = []
    for start in range(0, len(prompts), batch_size):
        batch = collate([Row("", ids, [0]) for ids in prompts[start : start + batch_size]])
        with torch.inference_mode():
            asked = {
                name: tensor.to(device) for name, tensor in batch.items() if name != "labels"
            }  # a class that nobody named is no label
            logits = model(**asked).logits
        found += _checked(logits.to(torch.float64).softmax(dim=-1))
    model.train(was_training)
    return found


def _checked(probabilities: torch.Tensor) -> list[list[float]]:
    """Probabilities as lists; refused where there are none."""
    if not bool(torch.isfinite(probabilities).all()):
        raise EvaluationError(
            "the model's logits are not finite, so no answer is the likeliest; check the model and its number type"
        )
    rows: list[list[float]] = probabilities.tolist()
    return rows
