"""Answers from a model: batched decoding, each answer equal to the one it would get alone.

Decoder-only models are padded on the left, so that every prompt ends where generation begins. Prompts are the rows that
training saw (law 5). Prompts of similar length are decoded together; the answers come back in the order of the prompts.
How they are answered is tried before (`answer_trials`): greedy answers and draws of decoder-only models are made by
`decode_loop` where it gives the logits of `generate` of transformers; by the latter everywhere else.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftlab import answer_batches, decode_loop
from peftlab.answer_batches import batches, make_room
from peftlab.answer_cache import Opening
from peftlab.answer_trials import way_of_answering
from peftlab.batches import RowBuilder
from peftlab.decoding import DecodingSettings
from peftlab.errors import EvaluationError
from peftlab.method import Head
from peftlab.token_choice import FiniteLogits, StopTexts, make_draws, only_config, until_stop
from peftlab.token_choice import decoding_config as decoding_config

if TYPE_CHECKING:
    from peftlab.store import Opened

GREEDY = DecodingSettings()
"""The decoding where none is asked for."""
BATCH_SIZE = 32
"""Rows computed together where nobody says how many and it is no matter of speed: by `generate` of transformers, of
classes, of labels compared."""
MOST_ROWS = 512
"""Prompts decoded together where nobody says how many: from here on a processor gains nothing."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    head: Head,
    max_new_tokens: int,
    batch_size: int | None,
    decoding: DecodingSettings = GREEDY,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[Mapping[int, str]], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """Answers, greedy where nothing else is asked for.

    A batch that does not fit the memory of a GPU is halved, down to one prompt.

    Args:
        model: A generating model, on any device.
        tokenizer: Its tokenizer.
        prompts: Token rows from `RowBuilder.prompt_ids`.
        head: "causal" or "seq2seq".
        max_new_tokens: Longest answer in tokens.
        batch_size: Most prompts decoded together; as many as are fast and fit the memory where None.
        decoding: How; its own `max_new_tokens` is not looked at.
        seed: The run's seed, for draws whose settings name none.
        ids: What the draws of each prompt are keyed by; the prompts' numbers where None.
        progress: Told how many answers have been added.
        keep: Told answers, by number of the prompt, as soon as they are there.
        tell: Told why `decode_loop` is not used, where it might have been.

    Returns:
        The answers, stripped, without special tokens.

    Raises:
        EvaluationError: One prompt alone does not fit the memory, a logit is not finite, or the model cannot be decoded
            so.
    """
    answers: dict[int, str] = {}
    names = [str(number) for number in range(len(prompts))] if ids is None else list(ids)
    root = seed if decoding.sampling_seed is None else decoding.sampling_seed
    config = decoding_config(tokenizer, max_new_tokens, decoding)
    was_training = model.training
    model.eval()
    by_loop = decoding.decoding != "beam"
    with way_of_answering(
        model, tokenizer, prompts, head, together=batch_size != 1, by_loop=by_loop, tell=tell
    ) as way:
        size = 1 if way.alone else batch_size or (BATCH_SIZE if way.opening is None else MOST_ROWS)
        room = 0 if way.most_tokens is None else max_new_tokens
        waiting = deque(batches(prompts, size, padded=way.padded, room=room, most_tokens=way.most_tokens))

        def note(chosen: list[int], texts: Mapping[int, str]) -> None:
            """Take over the answers of some places of a batch."""
            made = {chosen[place]: until_stop(text, decoding.stop) for place, text in texts.items()}
            answers.update(made)
            if keep is not None:
                keep(made)
            if progress is not None:
                progress(len(made))

        while waiting:
            chosen = waiting.popleft()
            rows = [prompts[i] for i in chosen]
            asked = [names[i] for i in chosen]
            processors = [FiniteLogits(asked, config.eos_token_id), *make_draws(decoding, asked, root)]
            fits = True
            try:
                leaving = partial(note, chosen)
                _answer_batch(
                    model, tokenizer, rows, head, config, processors, decoding.stop, leaving, way.opening
                )
            except torch.OutOfMemoryError:
                fits = False  # the batch is halved below, outside of the exception that holds its tensors
            except ValueError as error:  # what transformers raises where a model lacks a way to decode
                raise EvaluationError(
                    f"{type(model).__name__} cannot be decoded so ({decoding.decoding}): {error}; try another"
                    " evaluation.decoding"
                ) from error
            if not fits:
                make_room(model, rows)
                left = [i for i in chosen if i not in answers]
                half = len(left) // 2
                waiting.extendleft(part for part in (left[half:], left[:half]) if part)
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def _answer_batch(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    head: Head,
    config: Any,
    processors: list[Any],
    stop: Sequence[str],
    leaving: Callable[[Mapping[int, str]], None],
    opening: Opening | None,
) -> None:
    """Answer one batch together, by `decode_loop` where there is an opening; what is there is told by place."""
    device = next(model.parameters()).device
    if opening is not None:
        _answer_in_loop(model, tokenizer, rows, config, processors, stop, leaving, opening)
        return
    ids, mask = answer_batches.pad(rows, tokenizer.pad_token_id, left=head == "causal")
    begins = ids.shape[1] if head == "causal" else 0
    with torch.inference_mode(), warnings.catch_warnings(), only_config(config, model) as config:
        # rows behind virtual tokens have no pads, so that positions are those in order, as peft then counts them
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=processors,
            **({"stopping_criteria": [StopTexts(tokenizer, stop, begins)]} if stop else {}),
        )
    new = output[:, begins:]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    leaving(dict(enumerate(texts)))


def _answer_in_loop(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    config: Any,
    processors: list[Any],
    stop: Sequence[str],
    leaving: Callable[[Mapping[int, str]], None],
    opening: Opening,
) -> None:
    """Answer one batch, rows leaving it as they end."""
    device = next(model.parameters()).device
    ids, mask = answer_batches.pad(
        [row[opening.num_tokens :] for row in rows], tokenizer.pad_token_id, left=True
    )

    def written(made: Mapping[int, list[int]]) -> None:
        texts = tokenizer.batch_decode(
            list(made.values()), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        leaving(dict(zip(made, texts, strict=True)))

    decode_loop.decode(
        model,
        ids.to(device),
        mask.to(device),
        max_new_tokens=config.max_new_tokens,
        end_id=config.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        processors=processors,
        ended=StopTexts(tokenizer, stop, ids.shape[1]) if stop else None,
        opening=opening,
        leaving=written,
    )


def classify(model: Any, prompts: Sequence[list[int]], *, pad_id: int, batch_size: int) -> list[str]:
    """Class indices from a classification head.

    Args:
        model: A sequence-classification model.
        prompts: Token rows.
        pad_id: Token that fills.
        batch_size: Rows classified together.

    Returns:
        The index of the largest logit of each row, as a string.

    Raises:
        EvaluationError: A logit is not finite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = answer_batches.pad(list(prompts[start : start + batch_size]), pad_id, left=False)
        with torch.inference_mode():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        if not bool(logits.isfinite().all()):
            raise EvaluationError(
                "the model's logits are not finite, so no class is the likeliest; check the model and its number type"
            )
        answers += [str(i) for i in logits.argmax(dim=-1).tolist()]
    model.train(was_training)
    return answers


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
    limit = max_new_tokens or settings.answer_tokens(opened.task)
    builder = RowBuilder(opened.tokenizer, prompt=opened.prompt, head=opened.head, max_length=length)
    room = max_prompt_tokens(opened.model, limit) if opened.head == "causal" else length
    rows = [builder.prompt_ids(prompt, room=room) for prompt in prompts]
    if opened.head == "classification":
        pad = opened.tokenizer.pad_token_id
        classes = classify(opened.model, rows, pad_id=pad, batch_size=settings.batch_size or BATCH_SIZE)
        return [opened.labels[int(index)] for index in classes]
    return generate(
        opened.model,
        opened.tokenizer,
        rows,
        head=opened.head,
        max_new_tokens=limit,
        batch_size=settings.batch_size,
        decoding=settings,
        seed=opened.config.training.seed,
        ids=prompts,
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
