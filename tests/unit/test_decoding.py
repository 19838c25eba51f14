"""Beam search, draws and stop texts: each answer is the one it would get alone; settings without effect are errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from peftlab import generation, token_choice
from peftlab.config import EvaluationSettings, build_config
from peftlab.decoding import MAX_NEW_TOKENS, DecodingSettings
from peftlab.errors import ConfigError, EvaluationError
from peftlab.generation import generate
from peftlab.settings import validate
from peftlab.streams import seed_for

TOKENIZER = tiny_models.tokenizer()
PROMPTS = [[1, 5, 9, 20], [1, 7], [1, 33, 12, 40, 8, 30, 21, 11, 6], [1, 22, 17], [1, 5, 9, 20, 6, 18]]
NAMES = [f"test-{number}" for number in range(len(PROMPTS))]
SAMPLE = DecodingSettings(decoding="sample", temperature=0.7, top_p=0.9, sampling_seed=3)
BEAM = DecodingSettings(decoding="beam", num_beams=3, length_penalty=0.5)


def answers(model: Any, decoding: DecodingSettings, *, head: str = "causal", **rest: Any) -> list[str]:
    given: dict[str, Any] = {"batch_size": 5, "ids": NAMES, "max_new_tokens": 10} | rest
    return generate(model, TOKENIZER, PROMPTS, head=head, decoding=decoding, **given)  # type: ignore[arg-type]


def model_of(name: str) -> Any:
    return tiny_models.build(name, seed=0).double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("decoding", [SAMPLE, BEAM], ids=["sample", "beam"])
def test_batched_equals_alone(name: str, decoding: DecodingSettings) -> None:
    model, head = model_of(name), tiny_models.HEADS[name]
    together = answers(model, decoding, head=head)
    assert answers(model, decoding, head=head, batch_size=1) == together
    assert answers(model, decoding, head=head, batch_size=2) == together
    assert len(set(together)) > 1


def test_draws_are_keyed_by_example_and_seed() -> None:
    model = model_of("llama")
    made = answers(model, SAMPLE)
    assert answers(model, SAMPLE) == made, "drawn again, the same"
    other = SAMPLE.model_copy(update={"sampling_seed": 4})
    assert answers(model, other) != made
    assert answers(model, SAMPLE, ids=NAMES[::-1]) != made
    assert answers(model, SAMPLE.model_copy(update={"sampling_seed": None}), seed=3) == made
    assert answers(model, DecodingSettings()) != made


def test_companion_one_stream_for_the_batch_would_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    shared = np.random.default_rng(0)
    monkeypatch.setattr(token_choice.np.random, "default_rng", lambda _: shared)
    together = answers(model, SAMPLE)
    assert answers(model, SAMPLE, batch_size=1) != together


@torch.no_grad()
def test_draws_by_hand() -> None:
    """The next token is where a keyed uniform number falls in the cumulated softmax."""
    model, prompt = model_of("llama"), PROMPTS[0]
    out: list[int] = []
    for step in range(6):
        logits = model(input_ids=torch.tensor([prompt + out])).logits[0, -1] / 0.7
        heights = logits.softmax(-1).cumsum(-1)
        uniform = np.random.default_rng(seed_for(9, "sampling", "test-0", step)).random()
        out.append(int((heights <= uniform * heights[-1]).sum()))
        if out[-1] == TOKENIZER.eos_token_id:
            break
    decoding = DecodingSettings(decoding="sample", temperature=0.7, sampling_seed=9)
    made = generate(
        model, TOKENIZER, [prompt], head="causal", max_new_tokens=6, batch_size=1, decoding=decoding, ids=["test-0"]
    )  # fmt: skip
    assert made == [TOKENIZER.decode(out, skip_special_tokens=True).strip()]


def test_draws_follow_the_probabilities() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)).repeat(4000, 1)
    (draw,) = token_choice.make_draws(DecodingSettings(decoding="sample"), [str(i) for i in range(4000)], 1)
    share = (draw(None, scores) == 0).double().mean(0)
    assert torch.allclose(share, torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64), atol=0.03)
    nucleus = token_choice.make_draws(
        DecodingSettings(decoding="sample", top_p=0.6), [str(i) for i in range(4000)], 1
    )
    drawn = nucleus(None, scores)
    assert (drawn == 0).double().mean(0)[3] == 0, "the unlikely tail is never drawn"


def test_beams_are_those_of_transformers() -> None:
    model = model_of("llama")
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=10, num_beams=3, length_penalty=0.5, do_sample=False
        )  # fmt: skip
    text = TOKENIZER.decode(expected[0, len(PROMPTS[0]) :], skip_special_tokens=True).strip()
    assert answers(model, BEAM)[0] == text


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_answer_ends_at_a_stop_text(name: str) -> None:
    model, head = model_of(name), tiny_models.HEADS[name]
    whole = answers(model, DecodingSettings(), head=head)
    words = next(text.split() for text in whole if len(text.split()) > 2)
    stop = DecodingSettings(stop=(words[1],))
    made = answers(model, stop, head=head)
    assert made == [text.split(words[1])[0].strip() for text in whole]
    assert made != whole
    assert answers(model, stop, head=head, batch_size=1) == made


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, most = model_of("llama"), 2
    expected, sizes = answers(model, DecodingSettings()), []
    real = generation._answer_batch

    def limited(model: Any, tokenizer: Any, rows: list[list[int]], *rest: Any) -> None:
        sizes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("no room")
        real(model, tokenizer, rows, *rest)

    monkeypatch.setattr(generation, "_answer_batch", limited)
    assert answers(model, DecodingSettings()) == expected
    assert sizes == [5, 2, 3, 1, 2]
    most = 0
    with pytest.raises(EvaluationError, match=r"one prompt of 2 tokens does not fit the memory"):
        answers(model, DecodingSettings())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_beams": 4}, "num_beams has no effect on greedy decoding"),
        ({"decoding": "beam", "top_p": 0.9}, "top_p has no effect on beam decoding"),
        ({"decoding": "sample", "length_penalty": 1}, "length_penalty has no effect on sample decoding"),
        ({"temperature": 0.5}, "set decoding to sample"),
        ({"stop": ["a", ""]}, "stop holds an empty text"),
        ({"decoding": "beam", "num_beams": 1}, "greater than or equal to 2"),
        ({"decoding": "guess"}, "must be 'greedy', 'beam' or 'sample'"),
    ],
)
def test_settings_without_effect_are_errors(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"evaluation": values})
    assert said in str(caught.value)


def test_what_was_chosen_is_told() -> None:
    assert DecodingSettings().describe(seed=1) == {"kind": "greedy"}
    assert BEAM.describe(seed=1) == {"kind": "beam", "num_beams": 3, "length_penalty": 0.5}
    zero = DecodingSettings(decoding="beam", length_penalty=0)
    assert zero.describe(seed=1) == {"kind": "beam", "num_beams": 4, "length_penalty": 0}
    told = validate(EvaluationSettings, {"decoding": "sample", "stop": ["\n"]}).describe(seed=7)
    assert told == {
        "kind": "sample",
        "temperature": 1,
        "top_k": None,
        "top_p": None,
        "seed": 7,
        "stop": ["\n"],
    }


def test_the_longest_answer_is_the_tasks_own() -> None:
    from peftlab.tasks import code_generation, embedded

    assert DecodingSettings().answer_tokens(embedded) == MAX_NEW_TOKENS
    assert DecodingSettings().answer_tokens(code_generation) == 256
    assert DecodingSettings(max_new_tokens=5).answer_tokens(code_generation) == 5
