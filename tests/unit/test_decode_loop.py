"""The decoding loop: rows leave, prompts are read in parts, and every answer is the one its prompt gets alone.

Each way in which it could go wrong is done to it on purpose once, and seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import tiny_models
from peftlab import answer_cache, decode_loop
from peftlab.answer_batches import pad
from peftlab.answer_cache import NO_OPENING, RoomyLayer

LENGTHS = (3, 1, 9, 4, 6, 2, 7, 5, 3, 8, 2, 4)
OPENING = [1, 5, 9, 20, 33, 12, 40, 8, 30]
NEW = 14
NAMES = ["llama", "gpt2", "opt", "phi3"]


def make_prompts(opening: list[int]) -> list[list[int]]:
    source = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 60, (length,), generator=source).tolist() for length in LENGTHS]
    return [opening + row for row in rows]


def is_end(token: Any, number: int) -> Any:
    """An end that comes after one token here and twelve there."""
    return (token + number * number) % 6 == 0


class Forbidden:
    """Rules out what belongs to each prompt: half of the tokens, others for each."""

    def __init__(self, rows: int) -> None:
        self.rows = list(range(rows))

    def __call__(self, _: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        for place, row in enumerate(self.rows[: len(logits)]):
            logits[place, row % 2 :: 2] = -torch.inf
        return logits

    def keep_rows(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


@torch.no_grad()
def alone(model: Any, prompt: list[int], number: int) -> list[int]:
    """An answer by whole passes, without pads and without a cache."""
    row, found = list(prompt), list[int]()
    for _ in range(NEW):
        logits = model(input_ids=torch.tensor([row])).logits[0, -1].float()
        logits[number % 2 :: 2] = -torch.inf
        token = int(logits.argmax())
        row.append(token)
        found.append(token)
        if is_end(token, len(found)):
            break
    return found


def together(
    model: Any, prompts: list[list[int]], opening: Any = NO_OPENING, most: int | None = 20
) -> list[list[int]]:
    ids, mask = pad([row[opening.num_tokens :] for row in prompts], 0, left=True)
    return decode_loop.decode(
        model, ids, mask, max_new_tokens=NEW, end_id=None, pad_id=0, processors=[Forbidden(len(prompts))],
        ended=lambda rows, _: is_end(rows[:, -1], rows.shape[1] - ids.shape[1]), opening=opening, read_together=most,
    )  # fmt: skip


def model_of(name: str) -> Any:
    return tiny_models.build(name).double()


@pytest.mark.parametrize("most", [1, 20, None])
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_the_one_of_its_prompt_alone(name: str, most: int | None) -> None:
    model, prompts = model_of(name), make_prompts([])
    expected = [alone(model, prompt, number) for number, prompt in enumerate(prompts)]
    assert len({len(answer) for answer in expected}) > 2, "answers end at different places"
    assert together(model, prompts, most=most) == expected


@pytest.mark.parametrize("most", [1, None])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_shared_opening_is_read_once(name: str, most: int | None) -> None:
    model, prompts = model_of(name), make_prompts(OPENING)
    opening = decode_loop.shared_opening(model, prompts)
    assert opening.num_tokens == len(OPENING)
    expected = [alone(model, prompt, number) for number, prompt in enumerate(prompts)]
    assert together(model, prompts, opening, most) == expected


def test_layers_that_see_a_window_are_read_at_once() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, pad_token_id=0,
    )  # fmt: skip
    model = tiny_models.randomise(MistralForCausalLM(config)).double().eval()
    prompts = make_prompts(OPENING)
    assert decode_loop.shared_opening(model, prompts) is NO_OPENING
    expected = [alone(model, prompt, number) for number, prompt in enumerate(prompts)]
    assert together(model, prompts) == expected


def test_rows_leave_soon_after_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, sizes = model_of("llama"), make_prompts([]), []
    whole = decode_loop._forward

    def watched(model: Any, new: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        sizes.append(len(new))
        return whole(model, new, mask, cache)

    monkeypatch.setattr(decode_loop, "_forward", watched)
    answers = together(model, prompts, most=None)
    expected = [len(prompts)] + [sum(len(a) > step for a in answers) for step in range(1, NEW)]
    assert sizes == [size for size in expected if size]


def others_leave(
    cache: Any, processors: Any, left: torch.Tensor, whole: Any = answer_cache.keep_rows
) -> None:
    whole(cache, processors, (left - 1).clamp(min=0))


def last_leave(layer: Any, indices: torch.Tensor) -> None:
    for name in ("keys", "values"):
        layer._rooms[name] = layer._rooms[name][: len(indices)]
        setattr(layer, name, getattr(layer, name)[: len(indices)])


def ends_in_front(
    layer: Any, part: Any, rows: slice, num_rows: int, width: int, shared: int, whole: Any = RoomyLayer.put
) -> None:
    whole(layer, part, rows, num_rows, width, shared)
    for name in ("keys", "values"):
        new, held = getattr(part, name), getattr(layer, name)
        held[rows] = 0
        held[rows, :, : new.shape[-2]] = new


def one_further(
    model: Any, new: torch.Tensor, mask: torch.Tensor, cache: Any, whole: Any = decode_loop._forward
) -> torch.Tensor:
    if new.shape[1] > 1:
        return whole(model, new, mask, cache)
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_ids": kwargs["position_ids"] + 1}),
        with_kwargs=True,
    )
    found = whole(model, new, mask, cache)
    handle.remove()
    return found


def unmasked(
    model: Any, new: torch.Tensor, mask: torch.Tensor, cache: Any, whole: Any = decode_loop._forward
) -> torch.Tensor:
    return whole(model, new, torch.ones_like(mask), cache)


FAULTS = {
    "the wrong rows leave": (decode_loop, "keep_rows", others_leave),
    "keys and values of other rows stay": (RoomyLayer, "batch_select_indices", last_leave),
    "prompts end where they begin": (RoomyLayer, "put", ends_in_front),
    "positions are one further": (decode_loop, "_forward", one_further),
    "pads are seen": (decode_loop, "_forward", unmasked),
    "processors are not told who leaves": (Forbidden, "keep_rows", lambda *_: None),
    "processors are left out": (Forbidden, "__call__", lambda _, __, logits: logits),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_companion_each_fault_gives_other_answers(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of("gpt2"), make_prompts([])
    expected = together(model, prompts)
    monkeypatch.setattr(*FAULTS[fault])
    assert together(model, prompts) != expected


def test_companion_the_opening_of_other_prompts_gives_other_answers() -> None:
    model, prompts = model_of("llama"), make_prompts(OPENING)
    other = decode_loop.shared_opening(model, make_prompts([token + 1 for token in OPENING]))
    assert together(model, prompts, other) != together(
        model, prompts, decode_loop.shared_opening(model, prompts)
    )


@pytest.mark.parametrize("fault", ["the wrong rows leave", "keys and values of other rows stay", "positions are one further",
                                   "prompts end where they begin"])  # fmt: skip
def test_the_trial_sees_these_faults_too(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two prompts the one that is looked at takes the place of the other, which leaves; each is read by itself."""
    model = model_of("gpt2")
    ids, mask = pad([make_prompts([])[3], make_prompts([])[2]], 0, left=True)
    expected = decode_loop.first_logits(model, ids, mask)
    monkeypatch.setattr(*FAULTS[fault])
    assert not torch.allclose(decode_loop.first_logits(model, ids, mask), expected, atol=1e-3)


def test_a_row_that_stays_is_not_copied() -> None:
    """Only what takes the place of another moves, in the room that there is."""
    layer, model = RoomyLayer(4), torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 3, 4).clone()
    layer.update(model, -model)
    place = layer.keys.data_ptr()
    left = decode_loop._places(torch.tensor([False, True, False, True, False]))
    assert left.tolist() == [0, 4, 2]
    layer.batch_select_indices(left)
    assert layer.keys[:, 0, 0, 0].tolist() == [0, 4, 2]
    assert layer.values[:, 1, 2, 3].tolist() == [0, -4, -2]
    layer.update(model[:3, :, :1], -model[:3, :, :1])
    assert (layer.keys.data_ptr(), layer.keys.shape[2]) == (place, 4)


def test_parts_keep_to_their_number_of_tokens() -> None:
    found = decode_loop._parts([3, 4, 9, 2, 30], 10)
    assert [(rows.start, rows.stop, longest) for rows, longest in found] == [
        (0, 2, 4), (2, 3, 9), (3, 4, 2), (4, 5, 30),
    ]  # fmt: skip
    assert decode_loop._parts([3, 4], 100) == [(slice(0, 2), 4)]


def test_room_is_made_where_more_comes_than_was_thought() -> None:
    model, prompts = model_of("llama"), make_prompts([])
    expected = together(model, prompts)
    made = answer_cache.new_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_loop, "new_cache", lambda inner, spare=0: made(inner, 1))
        assert together(model, prompts) == expected
