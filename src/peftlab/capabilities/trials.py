"""What a method promises, each tried on tiny models: a trial returns where it holds, and raises where it does not."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from peftlab.capabilities.bases import (
    PADS,
    Base,
    answers,
    attach,
    counted_calls,
    gradients,
    largest_difference,
    move,
)
from peftlab.capabilities.counts import count_by_formula
from peftlab.errors import MethodError
from peftlab.gradients import read_gradients
from peftlab.loading import switch_checkpointing
from peftlab.method import Attachment, Head
from peftlab.objective import ModelLoss
from peftlab.phases import PhaseSwitch
from peftlab.proof import PhaseProof, TrainingProof
from peftlab.schedule import PhaseSettings, Schedule, place_phases

EXACT, NEARLY = 1e-10, 1e-6
"""How far logits may differ in float64, and gradients, as a share of their largest: a Llama's norms compute in float32."""
_RATE, _STEPS, _RUN = 1e-2, 4, 20
_SMALL_RATE, _MOST = 2e-4, 0.9
"""A learning rate as runs have it, and which share of what has a gradient must have moved by it."""
_RESUMED_AFTER, _RESUMED_STEPS = 4, 6
_PHASE_STEPS, _NEW_TOKENS = 3, 6


class NotApplicable(Exception):
    """A property that has no place in this model."""


def train(attached: Attachment, batch: dict[str, torch.Tensor], head: Head) -> None:
    """Train until law 1 is shown.

    Args:
        attached: The adapter.
        batch: What it is trained on.
        head: The kind of task.
    """
    parameters = attached.parameters()
    steps = max(_STEPS, *(attached.steps_to_train(name) for name in parameters))
    schedule = Schedule(place_phases([], total_steps=max(_RUN, steps)), max(_RUN, steps), _RATE, 0)
    shown = _run(attached, batch, head, schedule, steps=range(steps))
    if not shown:
        raise AssertionError(f"not every tensor was shown to train in {steps} steps")


def _run(
    attached: Attachment,
    batch: dict[str, torch.Tensor],
    head: Head,
    schedule: Schedule,
    *,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
    rate: float = _RATE,
) -> list[PhaseProof]:
    """Take optimizer steps as the trainer does; the phases that were shown to train."""
    parameters = attached.parameters()
    attached.begin(schedule)
    switch = PhaseSwitch(schedule, attached.family, parameters)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters.values(), lr=_RATE)
    proof, objective, shown = TrainingProof(parameters, attached.steps_to_train), ModelLoss(head), []
    attached.model.train()
    for step in steps:
        torch.manual_seed(step)
        phase = switch.apply(step, optimizer)
        if phase is not None:
            proof.enter(phase.name)
        optimizer.zero_grad()
        torch.autograd.backward(objective.total(attached.model, batch) / objective.count(batch))
        proof.observe(read_gradients(parameters), step=step + 1)
        optimizer.step()
        found = proof.after_step(learning_rate=rate, step=step + 1)
        if found is not None and found.unreached:
            raise AssertionError(f"the forward pass does not reach {', '.join(found.unreached[:3])}")
        shown += [found] if found is not None else []
        attached.after_step(step + 1)
    proof.check_frozen()
    attached.model.eval()
    return shown


def try_count(method: str, base: Base) -> None:
    """As many parameters train as the paper's formula says."""
    expected = count_by_formula(method, base.build(), base)
    attached = attach(method, base, base.build())
    found = sum(p.numel() for p in attached.parameters().values())
    if found != expected:
        raise AssertionError(f"{found} parameters train and the formula gives {expected}")


def try_accumulation(method: str, base: Base) -> None:
    """A step over two batches of two rows is one over four, loss and gradients, with unequally many labels in the rows."""
    model = base.build(torch.float64, dropout=False)
    batch = base.batch(model, rows=4)
    attached = attach(method, base, model, dropout=False)
    move(attached)
    whole, expected = gradients(attached, base.head, [batch])
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    parts, found = gradients(attached, base.head, halves)
    apart = largest_difference(expected, found)
    if abs(whole - parts) > NEARLY or apart > NEARLY:
        raise AssertionError(f"2 x 2 rows and 1 x 4: loss {parts} and {whole}, gradients {apart:.1e} apart")


def try_bfloat16(method: str, base: Base) -> None:
    """On a base in bfloat16 a small learning rate moves every tensor, to finite values, and the base comes back."""
    model = base.build(torch.bfloat16)
    batch, before = base.batch(model), {n: t.clone() for n, t in model.state_dict().items()}
    attached = attach(method, base, model)
    _check_small_steps(attached, batch, base.head)
    tensors = {**attached.parameters(), "logits": answers(attached.model, batch)}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.detach()).all()]
    if bad:
        raise AssertionError(f"not finite: {', '.join(bad[:3])}")
    after = attached.remove().state_dict()
    if before.keys() != after.keys() or any(
        before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n]) for n in before
    ):
        raise AssertionError("removed, the adapter leaves another base behind")


def _check_small_steps(attached: Attachment, batch: dict[str, torch.Tensor], head: Head) -> None:
    """Train with a small learning rate; of every tensor nearly all that has a gradient has moved, none is rounded away."""
    parameters = attached.parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    moved: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:  # before a method that allocates sets what it prunes to zero again
        moved.update({name: p.detach() != start[name] for name, p in parameters.items()})

    steps = max(_RUN, *(attached.steps_to_train(name) for name in parameters))
    schedule = Schedule(place_phases([], total_steps=steps), steps, _SMALL_RATE, 0)
    optimizer = torch.optim.AdamW(parameters.values(), lr=_SMALL_RATE)
    optimizer.register_step_post_hook(look)
    _run(attached, batch, head, schedule, steps=range(steps), optimizer=optimizer, rate=_SMALL_RATE)
    for name, parameter in parameters.items():
        reached = moved[name][parameter.grad != 0] if parameter.grad is not None else moved[name][:0]
        if not len(reached) or float(reached.float().mean()) < _MOST:
            raise AssertionError(
                f"{int(reached.sum())} of {len(reached)} values of {name} with a gradient moved in {steps} steps of learning"
                f" rate {_SMALL_RATE}"
            )


def try_padding(method: str, base: Base) -> None:
    """A row is answered, and trains, as it does alone, whatever pads a longer neighbour makes it have."""
    model = base.build(torch.float64, dropout=False)
    if model.main_input_name != "input_ids":
        raise NotApplicable("a picture has no pads")
    batch = base.batch(model)
    attached = attach(method, base, model, dropout=False)
    move(attached)
    first, second = ({name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1))
    cut = ("input_ids", "attention_mask", *(["labels"] if base.head == "causal" else []))
    second |= {name: second[name][:, :-PADS] for name in cut}
    together = answers(attached.model, batch)
    alone = torch.cat([answers(attached.model, row) for row in (first, second)])
    apart = float((together - alone).abs().max())
    if apart > NEARLY * max(1.0, float(alone.abs().max())):
        raise AssertionError(f"padded and alone, the logits of a row are {apart:.1e} apart")
    whole, expected = gradients(attached, base.head, [batch])
    parts, found = gradients(attached, base.head, [first, second])
    apart = largest_difference(expected, found)
    if abs(whole - parts) > NEARLY or apart > NEARLY:
        raise AssertionError(f"padded and alone: loss {whole} and {parts}, gradients {apart:.1e} apart")


def try_checkpointing(method: str, base: Base) -> None:
    """With gradient checkpointing, blocks run twice and the gradients are the same."""
    found = []
    for on in (False, True):
        model = base.build(torch.float64, dropout=False)
        batch = base.batch(model)
        if on:
            switch_checkpointing(model, True)
        attached = attach(method, base, model, dropout=False)
        move(attached)
        last = attached.family.blocks(list(attached.family.stacks)[-1])[-1].path
        inside = _first_layer(attached.model.get_submodule(last))  # the block itself is called once
        with counted_calls(inside) as calls:
            found.append(gradients(attached, base.head, [batch])[1])
        if len(calls) != 1 + on:
            raise AssertionError(f"with checkpointing {'on' if on else 'off'}, {last} ran {len(calls)} times")
    apart = largest_difference(*found)
    if apart > NEARLY:
        raise AssertionError(f"with and without checkpointing the gradients are {apart:.1e} apart")


def _first_layer(block: nn.Module) -> nn.Module:
    """The first module in a block that computes with tensors of its own."""
    return next(m for m in block.modules() if m._parameters and not m._modules)


def try_generation(method: str, base: Base) -> None:
    """Greedy tokens with a cache are those that one pass over prompt and answer predicts, and those without a cache.

    A prefix is a cache: without one, its generation is refused.
    """
    from transformers import GenerationConfig

    if base.head == "classification":
        raise NotApplicable("a classifier generates nothing")
    model = base.build(torch.float64)
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    batch = base.batch(
        model, padded=base.head == "seq2seq"
    )  # prompts of one length: generation pads in front
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    attached = attach(method, base, model)
    move(attached)
    generate: Any = attached.model.generate
    asked = prompt | {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        made = generate(**asked, use_cache=True)
        try:
            without = generate(**asked, use_cache=False)
        except MethodError:
            if method != "prefix_tuning":
                raise
            without = made
        read = made[:, :-1]
        full = {"input_ids": read, "attention_mask": torch.ones_like(read)}
        if base.head == "seq2seq":
            full = prompt | {"decoder_input_ids": read}
        predicted = attached.model(**full, use_cache=False).logits[:, -_NEW_TOKENS:].argmax(-1)
    tokens, others = made[:, -_NEW_TOKENS:].tolist(), without[:, -_NEW_TOKENS:].tolist()
    if not tokens == predicted.tolist() == others:
        raise AssertionError(
            f"with a cache {tokens}, in one pass {predicted.tolist()}, without a cache {others}"
        )


def try_resume(method: str, base: Base) -> None:
    """Tensors and optimizer put back on a freshly attached model go on to the bits of a run that was not interrupted."""
    schedule = Schedule(place_phases([], total_steps=_RESUMED_STEPS), _RESUMED_STEPS, _RATE, 0)

    def start(seed: int) -> tuple[Attachment, torch.optim.Optimizer, dict[str, torch.Tensor]]:
        model = base.build()
        attached = attach(method, base, model, seed=seed)
        return attached, torch.optim.AdamW(attached.parameters().values(), lr=_RATE), base.batch(model)

    whole, optimizer, batch = start(seed=0)
    _run(whole, batch, base.head, schedule, steps=range(_RESUMED_AFTER), optimizer=optimizer)
    kept, moments = whole.tensors(), optimizer.state_dict()
    moments = {
        **moments,
        "state": {k: {n: _copy(v) for n, v in s.items()} for k, s in moments["state"].items()},
    }
    rest = range(_RESUMED_AFTER, _RESUMED_STEPS)
    _run(whole, batch, base.head, schedule, steps=rest, optimizer=optimizer)
    other, optimizer, batch = start(seed=1)
    other.begin(schedule)
    other.load(kept)
    optimizer.load_state_dict(moments)
    _run(other, batch, base.head, schedule, steps=rest, optimizer=optimizer)
    expected, found = whole.tensors(), other.tensors()
    wrong = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if wrong or expected.keys() != found.keys():
        raise AssertionError(f"resumed, {len(wrong)} tensors end elsewhere: {', '.join(wrong[:3])}")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def try_phases(method: str, base: Base) -> None:
    """First the attention trains and then the MLP, each shown to train while the other stands still."""
    phases = [
        PhaseSettings(groups=("attention",), steps=_PHASE_STEPS),
        PhaseSettings(groups=("mlp",), steps=_PHASE_STEPS),
    ]
    total = 2 * _PHASE_STEPS
    schedule = Schedule(place_phases(phases, total_steps=total), total, _RATE, 0)
    model = base.build()
    batch = base.batch(model)
    attached = attach(method, base, model)
    parameters = attached.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=_RATE)
    for group, start in (("attention", 0), ("mlp", _PHASE_STEPS)):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        steps = range(start, start + _PHASE_STEPS)
        shown = _run(attached, batch, base.head, schedule, steps=steps, optimizer=optimizer)
        if [proof.phase for proof in shown] != [group]:
            raise AssertionError(f"the {group} was not shown to train in {_PHASE_STEPS} steps")
        moved = {name for name, p in parameters.items() if not torch.equal(before[name], p)}
        meant = {name for name in parameters if attached.family.locate(name).group == group}
        if moved != meant:
            raise AssertionError(f"in the phase of the {group}, moved or not: {min(moved ^ meant)}")


def try_merge(method: str, base: Base) -> None:
    """Merged, the base answers as the adapted model did, is plain, and is the same once saved and loaded by transformers."""
    model = base.build(torch.float64)
    batch, kinds = base.batch(model), {n: type(m) for n, m in model.named_modules()}
    attached = attach(method, base, model)
    move(attached)
    expected = answers(attached.model, batch)
    try:
        merged = attached.merge()
    except MethodError:
        if not torch.equal(answers(attached.model, batch), expected):
            raise AssertionError("a refused merge has changed the adapted model") from None
        raise
    _check_answers("merged", answers(merged, batch), expected)
    left = [
        n
        for n, m in merged.named_modules()
        if type(m) is not kinds.get(n, type(m)) or "peft" in type(m).__module__
    ]
    if left or merged is not model or any(name.count("lora") for name in merged.state_dict()):
        raise AssertionError(f"merged, the base is not plain at {', '.join(left[:3])}")
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again, report = type(merged).from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    odd = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if odd:
        raise AssertionError(f"saved and loaded, {odd[0]} does not fit")
    _check_answers("saved and loaded", answers(base.in_dtype(again.eval(), torch.float64), batch), expected)
    for verb in (attached.merge, attached.remove):
        _check_refused(verb)


def _check_answers(when: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    apart = float((found - expected).abs().max())
    if apart > EXACT * max(1.0, float(expected.abs().max())):
        raise AssertionError(f"{when}, the logits are {apart:.1e} apart")


def _check_refused(verb: Any) -> nn.Module | None:
    """A merged adapter can be neither merged nor removed."""
    try:
        found: nn.Module = verb()
    except MethodError:
        return None
    raise AssertionError(f"merged already, {verb.__name__} gave a {type(found).__name__}")
