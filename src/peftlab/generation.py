"""Answers from a model: batched decoding, each answer equal to the one it would get alone.

Decoder-only models are padded on the left, so that every prompt ends where generation begins. Prompts are the rows that
training saw (law 5). Prompts of similar length are decoded together; the answers come back in the order of the prompts.
Some models answer otherwise where there are pads, or beside another prompt (RWKV, XLNet). This is tried before: where a
padded prompt is not answered as it is alone, only prompts of one length are decoded together, or each by itself.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftlab.batches import RowBuilder
from peftlab.decoding import DecodingSettings
from peftlab.errors import EvaluationError
from peftlab.method import Head
from peftlab.token_choice import FiniteLogits, StopTexts, make_draws, until_stop

if TYPE_CHECKING:
    from peftlab.store import Opened

GREEDY = DecodingSettings()
"""The decoding where none is asked for."""
_TRIAL_PADS = 32


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    head: Head,
    max_new_tokens: int,
    batch_size: int,
    decoding: DecodingSettings = GREEDY,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[Mapping[int, str]], None] | None = None,
) -> list[str]:
    """Answers, greedy where nothing else is asked for.

    A batch that does not fit the memory of a GPU is halved, down to one prompt.

    Args:
        model: A generating model, on any device.
        tokenizer: Its tokenizer.
        prompts: Token rows from `RowBuilder.prompt_ids`.
        head: "causal" or "seq2seq".
        max_new_tokens: Longest answer in tokens.
        batch_size: Most prompts decoded together.
        decoding: How; its own `max_new_tokens` is not looked at.
        seed: The run's seed, for draws whose settings name none.
        ids: What the draws of each prompt are keyed by; the prompts' numbers where None.
        progress: Told how many answers have been added.
        keep: Told the answers of each batch, by number of the prompt, as soon as they are there.

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
    if batch_size > 1 and len(prompts) > 1:
        alike, padded = _try_together(model, tokenizer, prompts, head, padded=padded)
        batch_size = batch_size if alike else 1
    waiting = deque(_batches(prompts, batch_size, padded=padded))
    while waiting:
        chosen = waiting.popleft()
        rows = [prompts[i] for i in chosen]
        asked = [names[i] for i in chosen]
        processors = [FiniteLogits(asked, config.eos_token_id), *make_draws(decoding, asked, root)]
        try:
            texts = _answer_batch(model, tokenizer, rows, head, config, processors, decoding.stop)
        except torch.OutOfMemoryError:
            texts = None  # the batch is halved below, outside of the exception that holds its tensors
        except ValueError as error:  # what transformers raises where a model lacks a way to decode
            raise EvaluationError(
                f"{type(model).__name__} cannot be decoded so ({decoding.decoding}): {error}; try another"
                " evaluation.decoding"
            ) from error
        if texts is None:
            _make_room(model, rows)
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
) -> list[str]:
    """The answers of one batch, decoded together."""
    device = next(model.parameters()).device
    ids, mask = _pad(rows, tokenizer.pad_token_id, left=head == "causal")
    begins = ids.shape[1] if head == "causal" else 0
    with torch.inference_mode(), warnings.catch_warnings(), _only(config, model) as config:
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
            if _are_close(model, alone, beside):
                return True, True
        return _are_close(model, alone, _first_logits(model, tokenizer, [short, other], head)), False
    except (torch.OutOfMemoryError, ValueError):
        return True, padded  # told where the prompts are answered


def _first_logits(model: Any, tokenizer: Any, rows: list[list[int]], head: Head) -> torch.Tensor:
    """The logits of the first answer's first two tokens, shape (2 * vocab,), got as the answers are."""
    device = next(model.parameters()).device
    ids, mask = _pad(rows, tokenizer.pad_token_id, left=head == "causal")
    config = decoding_config(tokenizer, 2)
    config.output_logits, config.return_dict_in_generate, config.eos_token_id = True, True, None
    with torch.inference_mode(), warnings.catch_warnings(), _only(config, model) as config:
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    return torch.cat([step[0] for step in output.logits])


def _are_close(model: Any, alone: torch.Tensor, beside: torch.Tensor) -> bool:
    """Whether logits agree up to the root of what the model's numbers are rounded to, of their range."""
    known = alone.isfinite()
    if not bool(known.any()):
        return True  # told where the prompts are answered
    kinds = {alone.dtype, torch.float32, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    allowed = max(torch.finfo(kind).eps for kind in kinds) ** 0.5
    alone, difference = alone[known], (alone[known] - beside[known]).abs().max()
    return bool((known == beside.isfinite()).all()) and bool(
        difference <= allowed * (alone.max() - alone.min())
    )


def _make_room(model: Any, rows: list[list[int]]) -> None:
    """Give a GPU's cached memory back before a smaller batch is tried; refuse where there is none."""
    if len(rows) == 1:
        raise EvaluationError(
            f"one prompt of {len(rows[0])} tokens does not fit the memory of {next(model.parameters()).device};"
            " set a smaller task.max_length or evaluation.max_new_tokens, or use another device"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def decoding_config(tokenizer: Any, max_new_tokens: int, decoding: DecodingSettings = GREEDY) -> Any:
    """The decoding that was asked for, whatever the model's own generation config says.

    Draws are made by a logits processor of their own (`token_choice.KeyedDraw`), so for transformers sampling is greedy too.

    Args:
        tokenizer: The model's tokenizer.
        max_new_tokens: Longest answer in tokens.
        decoding: How.

    Returns:
        transformers' `GenerationConfig`.
    """
    from transformers import GenerationConfig

    told = decoding.describe(seed=0)
    beams = {"length_penalty": told["length_penalty"]} if decoding.decoding == "beam" else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=told.get("num_beams", 1),
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **beams,
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
