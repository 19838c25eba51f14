"""Greedy decoding: each answer is the one it would get alone, whatever the model's own settings say."""

import pytest
import torch
import transformers

import tiny_models
from peftlab import answer_batches, answer_trials, decode_loop
from peftlab.answer_batches import batches
from peftlab.batches import RowBuilder
from peftlab.decoding import DecodingSettings
from peftlab.errors import DataError, EvaluationError
from peftlab.generation import classify, decoding_config, generate, max_prompt_tokens
from peftlab.mapping import map_model
from peftlab.mapping.twin import twin_config
from peftlab.methods import lora
from peftlab.token_choice import FiniteLogits

TOKENIZER = tiny_models.tokenizer()
PROMPTS = [[1, 5, 9, 20], [1, 7], [1, 33, 12, 40, 8, 30, 21, 11, 6], [1, 22, 17], [1, 5, 9, 20, 6, 18]]


def answers(model, prompts=PROMPTS, *, head="causal", batch_size=5, new=12, tokenizer=TOKENIZER):
    return generate(model, tokenizer, prompts, head=head, max_new_tokens=new, batch_size=batch_size)


@torch.no_grad()
def by_hand(model, prompt, *, head, new=12):
    """Greedy decoding token by token, without padding and without a cache."""
    ids = torch.tensor([prompt])
    out = []
    for _ in range(new):
        if head == "causal":
            logits = model(input_ids=torch.cat([ids, torch.tensor([out], dtype=torch.long)], dim=1)).logits
        else:
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *out]])).logits
        token = int(logits[0, -1].argmax())
        out.append(token)
        if token == TOKENIZER.eos_token_id:
            break
    return TOKENIZER.decode(out, skip_special_tokens=True).strip()


def model_of(name, seed=0):
    return tiny_models.build(name, seed=seed).double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart"])
def test_batched_equals_alone_equals_by_hand(name):
    head = tiny_models.HEADS[name]
    if name == "bart":
        model = model_of(name)
        model.config.forced_eos_token_id = model.generation_config.forced_eos_token_id = None
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    else:
        model = model_of(name)
    expected = [by_hand(model, prompt, head=head) for prompt in PROMPTS]
    assert len(set(expected)) > 1, "the answers differ, so a mix-up would be seen"
    assert answers(model, head=head, batch_size=5) == expected
    assert answers(model, head=head, batch_size=2) == expected
    assert answers(model, head=head, batch_size=1) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("is_tried", [False, True])
def test_companion_right_padding_would_give_other_answers(name, is_tried, monkeypatch):
    """And is found out by the trial, which then has no prompt padded."""
    model = model_of(name)
    expected = answers(model)
    pad = answer_batches.pad
    monkeypatch.setattr(answer_batches, "pad", lambda rows, pad_id, *, left: pad(rows, pad_id, left=False))
    if not is_tried:
        monkeypatch.setattr(answer_trials, "_try_together", lambda *_, padded: (True, padded))
    assert (answers(model) == expected) is is_tried


@pytest.mark.parametrize("is_tried", [False, True])
def test_companion_without_the_mask_the_answers_differ(monkeypatch, is_tried):
    model = model_of("llama")
    expected = answers(model)
    pad = answer_batches.pad

    def unmasked(rows, pad_id, *, left):
        ids, mask = pad(rows, pad_id, left=left)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(answer_batches, "pad", unmasked)
    if not is_tried:
        monkeypatch.setattr(answer_trials, "_try_together", lambda *_, padded: (True, padded))
    assert (answers(model) == expected) is is_tried


@pytest.mark.parametrize("kind", ["rwkv", "xlnet"])
def test_models_that_answer_otherwise_in_a_batch(kind, monkeypatch):
    """RWKV reads pads and, in transformers 5.23, mixes the states of a batch; XLNet reads pads."""
    config = twin_config(transformers.CONFIG_MAPPING[kind](), num_layers=2)
    for name, value in (("vocab_size", 64), ("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        object.__setattr__(config, name, value)
    torch.manual_seed(0)
    model = tiny_models.randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()
    prompts = [*PROMPTS, [1, 9]]
    expected = answers(model, prompts, batch_size=1, new=4)
    assert len(set(expected)) > 1
    assert answers(model, prompts, new=4) == expected
    monkeypatch.setattr(answer_trials, "_try_together", lambda *_, padded: (True, padded))
    assert answers(model, prompts, new=4) != expected


def test_a_model_without_numbers_gives_no_answers():
    """An adapter that has diverged: every decoding says for which prompt and at which token."""
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for decoding in ("greedy", "beam", "sample"):
        with pytest.raises(EvaluationError, match=r"not finite at token 1 of the answer to 'test-7'"):
            generate(
                model,
                TOKENIZER,
                [[1, 5]],
                head="causal",
                max_new_tokens=4,
                batch_size=2,
                decoding=DecodingSettings(decoding=decoding),
                ids=["test-7"],
            )
    classifier = tiny_models.build("bert")
    with torch.no_grad():
        classifier.classifier.bias[1] = float("nan")
    with pytest.raises(EvaluationError, match="no class is the likeliest"):
        classify(classifier, PROMPTS, pad_id=0, batch_size=2)


def test_numbers_that_end_during_an_answer():
    """The row and the token are named; beams count as their prompt, an answer that has ended is not looked at."""
    check = FiniteLogits(["a", "b"], end_id=2)
    rows = torch.tensor([[1, 5]] * 4)
    assert check(rows, torch.zeros(4, 8)).sum() == 0
    bad = torch.zeros(4, 8)
    bad[3, 1], bad[0, 0] = float("inf"), -float("inf")
    with pytest.raises(EvaluationError, match="at token 2 of the answer to 'b'"):
        check(torch.cat([rows, torch.full((4, 1), 7)], dim=1), bad)
    assert check(torch.cat([rows, torch.full((4, 1), 2)], dim=1), bad) is bad


def test_a_pad_that_is_the_end_changes_nothing():
    model = model_of("llama")
    same_token = tiny_models.tokenizer(pad_is_eos=True)
    prompts = [[1, 2, 5, 9], [1, 7]]  # an end of sequence inside a prompt is not a pad
    assert answers(model, prompts, tokenizer=same_token) == answers(model, prompts)
    assert answers(model, prompts[:1], tokenizer=same_token) == [by_hand(model, prompts[0], head="causal")]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_models_own_sampling_settings_are_ignored(name):
    model, head = model_of(name), tiny_models.HEADS[name]
    expected = answers(model, head=head)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p = True, 5.0, 3, 0.5
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams, own.min_new_tokens = 3.0, 1, 3, 9
    own.suppress_tokens, own.bad_words_ids, own.max_new_tokens = [5, 6], [[7]], 3
    assert answers(model, head=head) == expected
    assert model.generation_config.temperature == 5.0, "and left as they were"


def test_an_adapter_decodes_the_same_way():
    base = model_of("llama")
    expected, own = answers(base), base.generation_config
    own.repetition_penalty, own.num_beams = 3.0, 3
    attached = lora.attach(base, map_model(base), lora.Settings(), head="causal", seed=0)
    assert answers(attached.model) == expected
    assert base.generation_config is own


def test_the_order_progress_and_mode_are_kept():
    model = model_of("llama").train()
    seen = []
    made = generate(
        model, TOKENIZER, PROMPTS, head="causal", max_new_tokens=4, batch_size=2, progress=seen.append
    )
    assert sum(seen) == len(PROMPTS)
    assert made == [answers(model, [prompt], new=4)[0] for prompt in PROMPTS]
    assert model.training
    assert generate(model, TOKENIZER, [], head="causal", max_new_tokens=4, batch_size=2) == []


def test_generation_stops_at_the_end_of_sequence():
    model = tiny_models.build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(10 * model.transformer.wte.weight[TOKENIZER.eos_token_id])
    assert answers(model) == [""] * len(PROMPTS)


def test_a_prompt_longer_than_the_positions_is_cut_in_its_source():
    model = tiny_models.build("gpt2")
    room = max_prompt_tokens(model, 12)
    assert room == 64 - 12
    builder = RowBuilder(TOKENIZER, prompt="Say: {source} =", head="causal", max_length=40)
    ids = builder.prompt_ids(" ".join(["cat"] * 300), room=room)
    assert len(ids) == room
    assert TOKENIZER.decode(ids[-1:]) == "=", "the template's end stays"
    made = answers(model, [ids, [1, 5]])
    assert made[1] == answers(model, [[1, 5]])[0]
    with pytest.raises(DataError, match="does not fit 2 tokens"):
        builder.prompt_ids("cat", room=2)


def test_positions_where_there_are_none():
    assert max_prompt_tokens(tiny_models.build("t5"), 10) == 1 << 20
    assert max_prompt_tokens(tiny_models.build("llama"), 60) == 8, "a prompt has some room in any case"


def test_the_decoding_is_greedy():
    config = decoding_config(TOKENIZER, 7)
    assert (config.do_sample, config.num_beams, config.max_new_tokens) == (False, 1, 7)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)


def test_classes_do_not_depend_on_the_batch():
    model = tiny_models.build("bert", seed=4).double().train()
    with torch.no_grad():
        model.classifier.weight.mul_(9)  # the answers shall differ
    made = classify(model, PROMPTS, pad_id=0, batch_size=5)
    assert made == classify(model, PROMPTS, pad_id=0, batch_size=1)
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = [str(int(model(input_ids=torch.tensor([p])).logits.argmax())) for p in PROMPTS]
    assert made == expected
    assert len(set(made)) > 1


OPENING = [1, 5, 9, 20, 33, 12, 40, 8, 30, 21]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("opening", [[], OPENING])
def test_the_loop_is_used_and_gives_the_tokens_of_generate(name, opening, monkeypatch):
    """A shared opening is computed once."""
    model, prompts, shared = model_of(name), [opening + row for row in PROMPTS], []
    share = decode_loop.shared_opening
    monkeypatch.setattr(answer_trials, "_try_loop", lambda *_, **__: None)
    expected = answers(model, prompts)
    monkeypatch.undo()

    monkeypatch.setattr(decode_loop, "shared_opening", lambda *a: shared.append(share(*a)) or shared[-1])
    told = []
    made = generate(
        model, TOKENIZER, prompts, head="causal", max_new_tokens=12, batch_size=None, tell=told.append,
        decoding=DecodingSettings(stop=("e",)),
    )  # fmt: skip
    assert not told
    assert shared[0].num_tokens == (0 if not opening else len(OPENING) + 1)
    assert made == [text.split("e")[0].strip() for text in expected]


def test_a_loop_that_differs_is_not_used(monkeypatch):
    model, told = model_of("llama"), []
    expected = answers(model)
    whole = decode_loop._forward
    monkeypatch.setattr(decode_loop, "_forward", lambda *a: -whole(*a))
    made = generate(
        model, TOKENIZER, PROMPTS, head="causal", max_new_tokens=12, batch_size=5, tell=told.append
    )
    assert made == expected
    assert told == ["LlamaForCausalLM gives other logits than by generate"]


def test_batches_keep_to_a_budget_of_tokens():
    rows = [[1] * length for length in (4, 2, 9, 3, 6)]
    assert list(batches(rows, 9, padded=True, room=1, most_tokens=10)) == [[1, 3], [0], [4], [2]]
    assert list(batches(rows, 2, padded=True)) == [[1, 3], [0, 4], [2]]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()])
def test_what_has_been_answered_is_kept_where_a_batch_breaks_off(error, monkeypatch):
    """Answers are told as their rows leave: a full memory asks only the others again, and a kill has lost only them."""
    model, kept, calls = model_of("llama"), [], []
    expected = answers(model)
    ends = next(words[2] for words in map(str.split, expected) if len(words) > 4)
    expected = [text.split(ends)[0].strip() for text in expected]
    whole = decode_loop._forward

    def full(model, new, mask, cache):
        calls.append(len(new))
        if calls[-1] < len(PROMPTS) == max(calls) and error not in kept:
            kept.append(error)
            raise error
        return whole(model, new, mask, cache)

    monkeypatch.setattr(decode_loop, "_forward", full)
    told = {}

    def keep(made):
        assert not told.keys() & made.keys(), "each once"
        told.update(made)

    def ask():
        return generate(
            model, TOKENIZER, PROMPTS, head="causal", max_new_tokens=12, batch_size=None, keep=keep,
            decoding=DecodingSettings(stop=(ends,)),
        )  # fmt: skip

    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert 0 < len(told) < len(PROMPTS)
    else:
        assert ask() == expected
        assert kept
        assert len(told) == len(PROMPTS)
    assert all(expected[i] == text for i, text in told.items())
