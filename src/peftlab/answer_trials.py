"""How prompts may be answered on a model, each way tried beside the plain one before it is used.

Some models answer otherwise where there are pads, or beside another prompt (RWKV, XLNet). Where a padded prompt is not
answered as it is alone, only prompts of one length are decoded together, or each by itself. `decode_loop` is used where it
gives the logits of `generate` of transformers; in float32 with the adapter folded into the weights, where these logits
are the same but for the rounding, and in half precision on a CPU with the model's eager attention, as the fused kernel
takes twice as long for one token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from peftlab import answer_batches, decode_loop
from peftlab.answer_batches import are_close, tokens_that_fit
from peftlab.answer_cache import NO_OPENING, Opening
from peftlab.attaching.folding import folded
from peftlab.attention_interface import attention_configs, eager_attention
from peftlab.method import Head
from peftlab.token_choice import decoding_config, only_config

FEWEST_FOLDED = 16
"""Prompts from which folding an adapter into the weights is worth its time."""
_TRIAL_PADS = 32
_ROUNDING = 0.7
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Way:
    """How prompts are answered.

    Attributes:
        padded: Whether prompts of several lengths may be decoded together.
        alone: Whether each prompt is decoded by itself.
        opening: What the prompts begin with, for `decode_loop`; None where `generate` of transformers answers.
        most_tokens: Tokens of prompts and answers that fit the memory together; None where that is not known.
    """

    padded: bool
    alone: bool = False
    opening: Opening | None = None
    most_tokens: int | None = None


@contextmanager
def way_of_answering(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    head: Head,
    *,
    together: bool,
    by_loop: bool,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Way]:
    """A context in which a model is as it answers the fastest, of the ways that a trial has not ruled out.

    Args:
        model: A generating model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token rows.
        head: "causal" or "seq2seq".
        together: Whether several prompts may be decoded together.
        by_loop: Whether `decode_loop` may answer them.
        tell: Told why it does not, where it might have.

    Yields:
        The way.
    """
    padded = head == "seq2seq" or not _has_virtual_tokens(model)
    if len(prompts) < 2 or not together:
        yield Way(padded)
        return
    alike, padded = _try_together(model, tokenizer, prompts, head, padded=padded)
    if not (alike and head == "causal" and by_loop):
        yield Way(padded, alone=not alike)
        return
    with ExitStack() as held:
        opening = _try_loop(model, tokenizer, prompts, tell, held, padded=padded)
        yield Way(padded, False, opening, None if opening is None else tokens_that_fit(model))


def _try_loop(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    tell: Callable[[str], None] | None,
    held: ExitStack,
    *,
    padded: bool,
) -> Opening | None:
    """What the prompts begin with, for `decode_loop`; None, and told why, where it does not give the logits of `generate`.

    The shortest prompt is answered beside another, which leaves after its first token. What makes the model faster is left
    on it, to be taken off by `held`.
    """
    why = "virtual tokens stand in front" if _has_virtual_tokens(model) else decode_loop.why_not(model)
    short, longest = min(prompts, key=len), max(prompts, key=len)
    rows = [short, longest[: len(short) + (_TRIAL_PADS if padded else 0)]]
    try:
        if why is None:
            expected = _first_logits(model, tokenizer, [short], "causal")
            for faster, power in _faster(model, len(prompts)):
                with ExitStack() as tried:
                    if tried.enter_context(faster) is False:
                        continue
                    opening = _opening_that_gives(expected, model, tokenizer, prompts, rows, power)
                    if opening is not None:
                        held.enter_context(tried.pop_all())
                        return opening
            why = f"{type(model).__name__} gives other logits than by generate"
    except torch.OutOfMemoryError:
        why = "the trial did not fit the memory"
    except decode_loop.FAILURES as error:
        why = f"{type(model).__name__} could not be tried: {error}"
    if tell is not None and why is not None:
        tell(why)
    return None


def _faster(model: Any, num_prompts: int) -> Iterator[tuple[AbstractContextManager[Any], float]]:
    """What makes a model faster, the fastest first and nothing last; how close its logits must be, as in `are_close`."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    implementations = {config._attn_implementation for config in attention_configs(model)}
    if num_prompts >= FEWEST_FOLDED:
        yield folded(model, most_bytes=answer_batches.bytes_that_fit(model)), _ROUNDING
    if weights[0].dtype in _HALF and weights[0].device.type == "cpu" and implementations == {"sdpa"}:
        yield eager_attention(model), 0.5
    yield nullcontext(), 0.5


def _opening_that_gives(
    expected: torch.Tensor,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    rows: list[list[int]],
    power: float,
) -> Opening | None:
    """What the prompts begin with, or nothing, whichever first gives the logits expected; None where neither does."""
    device, pad_id = next(model.parameters()).device, tokenizer.pad_token_id
    for opening in dict.fromkeys([decode_loop.shared_opening(model, prompts), NO_OPENING]):
        ids, mask = answer_batches.pad([row[opening.num_tokens :] for row in rows], pad_id, left=True)
        found = decode_loop.first_logits(model, ids.to(device), mask.to(device), opening)
        if are_close(model, expected, found, power):
            return opening
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
    ids, mask = answer_batches.pad(rows, tokenizer.pad_token_id, left=head == "causal")
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
