"""Answers from a model: batched decoding, each answer equal to the one it would get alone.

Decoder-only models are padded on the left, so that every prompt ends where generation begins. Prompts are the rows that
training saw (law 5). Prompts of similar length are decoded together; the answers come back in the order of the prompts.
Some models answer otherwise where there are pads, or beside another prompt (RWKV, XLNet). This is tried before: where a
padded prompt is not answered as it is alone, only prompts of one length are decoded together, or each by itself.

Greedy answers and draws of decoder-only models are made by `decode_loop`, where a trial shows that it gives the logits of
`generate` of transformers; by the latter everywhere else.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftlab import decode_loop
from peftlab.answer_batches import are_close, batches, make_room, tokens_that_fit
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
"""Prompts decoded together by `generate` of transformers where nobody says how many."""
MOST_ROWS = 128
"""Prompts decoded together where nobody says how many: from here on a processor gains little, and what a killed evaluation
has to do again grows."""
_TRIAL_PADS = 32


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
        keep: Told the answers of each batch, by number of the prompt, as soon as they are there.
        tell: Told why `decode_loop` is not used, where it might have been.

    Returns:
        The answers, stripped, without special tokens.

    Raises:
        EvaluationError: One prompt alone does not fit the memory, a logit is not finite, or the model cannot be decoded
            so.
    """
    answers = [""] * len(prompts)
    names = [str(number) for number in range(len(prompts))] if ids is None else list(ids)
    root = seed if decoding.sampling_seed is None else decoding.sampling_seed
    config = decoding_config(tokenizer, max_new_tokens, decoding)
    was_training = model.training
    model.eval()
    padded = head == "seq2seq" or not _has_virtual_tokens(model)
    loop, most_tokens = None, None
    if batch_size != 1 and len(prompts) > 1:
        alike, padded = _try_together(model, tokenizer, prompts, head, padded=padded)
        batch_size = batch_size if alike else 1
        if alike and head == "causal" and decoding.decoding != "beam":
            loop = _try_loop(model, tokenizer, prompts, tell, padded=padded)
            most_tokens = None if loop is None else tokens_that_fit(model)
    room = 0 if most_tokens is None else max_new_tokens
    batch_size = batch_size or (BATCH_SIZE if loop is None else MOST_ROWS)
    waiting = deque(batches(prompts, batch_size, padded=padded, room=room, most_tokens=most_tokens))
    while waiting:
        chosen = waiting.popleft()
        rows = [prompts[i] for i in chosen]
        asked = [names[i] for i in chosen]
        processors = [FiniteLogits(asked, config.eos_token_id), *make_draws(decoding, asked, root)]
        try:
            texts = _answer_batch(model, tokenizer, rows, head, config, processors, decoding.stop, loop)
        except torch.OutOfMemoryError:
            texts = None  # the batch is halved below, outside of the exception that holds its tensors
        except ValueError as error:  # what transformers raises where a model lacks a way to decode
            raise EvaluationError(
                f"{type(model).__name__} cannot be decoded so ({decoding.decoding}): {error}; try another"
                " evaluation.decoding"
            ) from error
        if texts is None:
            make_room(model, rows)
            half = len(chosen) // 2
            waiting.extendleft([chosen[half:], chosen[:half]])
            continue
        made = {i: until_stop(text, decoding.stop) for i, text in zip(chosen, texts, strict=True)}
        for i, text in made.items():
            answers[i] = text
        if keep is not None:
            keep(made)
        if progress is not None:
            progress(len(chosen))
    model.train(was_training)
    return answers


def _answer_batch(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    head: Head,
    config: Any,
    processors: list[Any],
    stop: Sequence[str],
    loop: decode_loop.Opening | None = None,
) -> list[str]:
    """The answers of one batch, decoded together: by `decode_loop` where `loop` says what its prompts begin with."""
    device = next(model.parameters()).device
    if loop is not None:
        return _answer_in_loop(model, tokenizer, rows, config, processors, stop, loop)
    ids, mask = _pad(rows, tokenizer.pad_token_id, left=head == "causal")
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
    texts: list[str] = tokenizer.batch_decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _answer_in_loop(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    config: Any,
    processors: list[Any],
    stop: Sequence[str],
    opening: decode_loop.Opening,
) -> list[str]:
    """The answers of one batch, rows leaving it as they end."""
    device = next(model.parameters()).device
    ids, mask = _pad([row[opening.num_tokens :] for row in rows], tokenizer.pad_token_id, left=True)
    made = decode_loop.decode(
        model,
        ids.to(device),
        mask.to(device),
        max_new_tokens=config.max_new_tokens,
        end_id=config.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        processors=processors,
        ended=StopTexts(tokenizer, stop, ids.shape[1]) if stop else None,
        opening=opening,
    )
    texts: list[str] = tokenizer.batch_decode(
        made, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _try_loop(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    tell: Callable[[str], None] | None,
    *,
    padded: bool,
) -> decode_loop.Opening | None:
    """What the prompts begin with, for `decode_loop`; None, and told why, where it does not give the logits of `generate`.

    The shortest prompt is answered beside another, which leaves after its first token.
    """
    why = "virtual tokens stand in front" if _has_virtual_tokens(model) else decode_loop.why_not(model)
    short, longest = min(prompts, key=len), max(prompts, key=len)
    rows = [short, longest[: len(short) + (_TRIAL_PADS if padded else 0)]]
    device, pad_id = next(model.parameters()).device, tokenizer.pad_token_id
    openings: dict[decode_loop.Opening, None] = {}
    try:
        if why is None:
            openings = dict.fromkeys([decode_loop.shared_opening(model, prompts), decode_loop.NO_OPENING])
            expected = _first_logits(model, tokenizer, [short], "causal")
        for opening in openings:
            ids, mask = _pad([row[opening.num_tokens :] for row in rows], pad_id, left=True)
            found = decode_loop.first_logits(model, ids.to(device), mask.to(device), opening)
            if are_close(model, expected, found):
                return opening
            why = f"{type(model).__name__} gives other logits than by generate"
    except torch.OutOfMemoryError:
        why = "the trial did not fit the memory"
    except decode_loop.FAILURES as error:
        why = f"{type(model).__name__} could not be tried: {error}"
    if tell is not None and why is not None:
        tell(why)
    return None


def _try_together(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], head: Head, *, padded: bool
) -> tuple[bool, bool]:
    """Whether a prompt is answered as it is alone beside another of its length, and padded (where it may be)."""
    short, longest = min(prompts, key=len), max(prompts, key=len)
    other = longest[: len(short)] if longest[: len(short)] != short else longest[-len(short) :]
    try:
        alone = _first_logits(model, tokenizer, [short], head)
        if padded and len(short) < len(longest):
            beside = _first_logits(model, tokenizer, [short, longest[: len(short) + _TRIAL_PADS]], head)
            if are_close(model, alone, beside):
                return True, True
        return are_close(model, alone, _first_logits(model, tokenizer, [short, other], head)), False
    except (torch.OutOfMemoryError, ValueError):
        return True, padded  # told where the prompts are answered


def _first_logits(model: Any, tokenizer: Any, rows: list[list[int]], head: Head) -> torch.Tensor:
    """The logits of the first answer's first two tokens, shape (2 * vocab,), got as the answers are."""
    device = next(model.parameters()).device
    ids, mask = _pad(rows, tokenizer.pad_token_id, left=head == "causal")
    config = decoding_config(tokenizer, 2)
    config.output_logits, config.return_dict_in_generate, config.eos_token_id = True, True, None
    with torch.inference_mode(), warnings.catch_warnings(), only_config(config, model) as config:
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    return torch.cat([step[0] for step in output.logits])


def _has_virtual_tokens(model: Any) -> bool:
    """Whether peft puts virtual tokens in front: pads between them and the text would shift the text's positions."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


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
        ids, mask = _pad(list(prompts[start : start + batch_size]), pad_id, left=False)
        with torch.inference_mode():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        if not bool(logits.isfinite().all()):
            raise EvaluationError(
                "the model's logits are not finite, so no class is the likeliest; check the model and its number type"
            )
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
    limit = max_new_tokens or settings.answer_tokens(opened.task)
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
