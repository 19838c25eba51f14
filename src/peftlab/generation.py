"""Answers from a model: batched greedy decoding, each answer equal to the one it would get alone.

Decoder-only models are padded on the left, so that every prompt ends where generation begins. Prompts are the rows that
training saw (law 5). Prompts of similar length are decoded together; the answers come back in the order of the prompts.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftlab.batches import RowBuilder
from peftlab.method import Head

if TYPE_CHECKING:
    from peftlab.store import Opened


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    head: Head,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers.

    Args:
        model: A generating model, on any device.
        tokenizer: Its tokenizer.
        prompts: Token rows from `RowBuilder.prompt_ids`.
        head: "causal" or "seq2seq".
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts decoded together.
        progress: Told how many answers have been added.

    Returns:
        The answers, stripped, without special tokens.
    """
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for chosen in _batches(prompts, batch_size, padded=head == "seq2seq" or not _has_virtual_tokens(model)):
        ids, mask = _pad([prompts[i] for i in chosen], tokenizer.pad_token_id, left=head == "causal")
        with (
            torch.inference_mode(),
            warnings.catch_warnings(),
            _only(decoding_config(tokenizer, max_new_tokens), model) as config,
        ):
            # rows behind virtual tokens have no pads, so that positions are those in order, as peft then counts them
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
        new = output[:, ids.shape[1] :] if head == "causal" else output
        texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        if progress is not None:
            progress(len(chosen))
    model.train(was_training)
    return answers


def _batches(prompts: Sequence[list[int]], batch_size: int, *, padded: bool) -> Iterator[list[int]]:
    """Numbers of prompts decoded together, shortest first; only of one length where none may be padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    alike = [order] if padded else [list(g) for _, g in itertools.groupby(order, lambda i: len(prompts[i]))]
    for group in alike:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _has_virtual_tokens(model: Any) -> bool:
    """Whether peft puts virtual tokens in front: pads between them and the text would shift the text's positions."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def decoding_config(tokenizer: Any, max_new_tokens: int) -> Any:
    """Greedy decoding, whatever the model's own generation config says.

    Args:
        tokenizer: The model's tokenizer.
        max_new_tokens: Longest answer in tokens.

    Returns:
        transformers' `GenerationConfig`.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@contextmanager
def _only(config: Any, model: Any) -> Iterator[Any]:
    """A decoding config that the model's own cannot fill up, as `generate` would do where a setting is not given.

    What the model's own says about structure, the token a decoder starts with, is taken over.

    Args:
        config: How to decode; completed.
        model: A generating model, bare or wrapped by peft.

    Yields:
        The config; the model's own is put back afterwards.
    """
    own = {m: vars(m)["generation_config"] for m in model.modules() if "generation_config" in vars(m)}
    starts = [getattr(c, "decoder_start_token_id", None) for c in own.values()]
    config.decoder_start_token_id = next((start for start in starts if start is not None), None)
    try:
        for module in own:
            module.generation_config = config
        yield config
    finally:
        for module, kept in own.items():
            module.generation_config = kept


def classify(model: Any, prompts: Sequence[list[int]], *, pad_id: int, batch_size: int) -> list[str]:
    """Class indices from a classification head.

    Args:
        model: A sequence-classification model.
        prompts: Token rows.
        pad_id: Token that fills.
        batch_size: Rows classified together.

    Returns:
        The index of the largest logit of each row, as a string.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = _pad(list(prompts[start : start + batch_size]), pad_id, left=False)
        with torch.inference_mode():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        answers += [str(i) for i in logits.argmax(dim=-1).tolist()]
    model.train(was_training)
    return answers


def _pad(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one (batch, seq) tensor and its attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


def answer(
    reference: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    directory: Path = Path("runs"),
) -> list[dict[str, str]]:
    """Answers of a finished run, with the adapter on and off.

    Args:
        reference: A run's path, its name, or "last".
        prompts: Source texts, before the task's prompt template.
        max_new_tokens: Longest answer; the run's own setting where None.
        directory: Where run folders lie.

    Returns:
        For each prompt: "prompt", "adapter_on", "adapter_off".

    Raises:
        InputError: There is no such run, or it has not finished.
        CheckpointError: The adapter does not fit the base, or a file is damaged.
    """
    from peftlab.store import open_run

    opened = open_run(reference, directory=directory)
    answers = {}
    for state in ("on", "off"):
        with opened.adapter(on=state == "on"):
            answers[state] = respond(opened, prompts, max_new_tokens=max_new_tokens)
    return [
        {"prompt": prompt, "adapter_on": on, "adapter_off": off}
        for prompt, on, off in zip(prompts, answers["on"], answers["off"], strict=True)
    ]


def respond(opened: Opened, prompts: Sequence[str], *, max_new_tokens: int | None = None) -> list[str]:
    """Answers of an opened run as it stands: text, or the names of classes.

    Args:
        opened: From `store.open_run`.
        prompts: Source texts, before the task's prompt template.
        max_new_tokens: Longest answer; the run's own setting where None.

    Returns:
        One answer for each prompt.
    """
    settings, length = opened.config.evaluation, opened.config.task.max_length
    limit = max_new_tokens or settings.max_new_tokens
    builder = RowBuilder(opened.tokenizer, prompt=opened.prompt, head=opened.head, max_length=length)
    room = max_prompt_tokens(opened.model, limit) if opened.head == "causal" else length
    rows = [builder.prompt_ids(prompt, room=room) for prompt in prompts]
    if opened.head == "classification":
        pad = opened.tokenizer.pad_token_id
        classes = classify(opened.model, rows, pad_id=pad, batch_size=settings.batch_size)
        return [opened.labels[int(index)] for index in classes]
    return generate(
        opened.model,
        opened.tokenizer,
        rows,
        head=opened.head,
        max_new_tokens=limit,
        batch_size=settings.batch_size,
    )


def max_prompt_tokens(model: Any, max_new_tokens: int) -> int:
    """How many prompt tokens leave room for the answer in a model's positions.

    Args:
        model: The model.
        max_new_tokens: Longest answer.

    Returns:
        The number; very large where the model has no position limit.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max(8, int(positions) - max_new_tokens) if positions else 1 << 20
