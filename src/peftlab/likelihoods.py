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
        EvaluationError: A prompt and an answer do not fit the builder's length.
    """
    asked = [Example(example.id, example.source, tuple(answers)) for example in examples]
    rows, count = builder.build(asked)
    if len(rows) != len(examples) * len(answers):
        why = "; ".join(f"{reason}: {number}" for reason, number in count.dropped.items())
        raise EvaluationError(
            f"the answers {', '.join(answers)} cannot be compared ({why}); raise task.max_length"
        )
    pad_id = builder.tokenizer.pad_token_id
    numbers = log_likelihoods(model, rows, pad_id=pad_id, head=builder.head, batch_size=batch_size)
    width = len(answers)
    groups = [numbers[start : start + width] for start in range(0, len(numbers), width)]
    return [answers[group.index(max(group))] for group in groups]
