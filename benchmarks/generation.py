"""Answers to E2E prompts, greedy: peftlab's evaluation against `generate` in unsorted batches of 8 in float32, in one run.

    python benchmarks/generation.py --data_dir E2E --tokenizer GPT2 --output generation.json
    python benchmarks/generation.py --lengths longest      no answer ends before --new_tokens

The model is the one of `training.py`, random weights with LoRA of rank 8 on all linear layers, its head apart from the
embedding and neither A nor B zero. Such a model does not end its answers as a trained one does, so that a logits processor,
the same for all contenders, ends each after as many tokens as a reference of its example has. Contenders take turns in one
process on the same prompts; the median of the ratios counts.

In float32 all must write the same tokens. In bfloat16 two models write on from the first near tie apart, so each token that
was written is looked up in the logits of the float32 model behind the same text, and so is the one that the bfloat16 model
likes best there in one plain pass, without batches, pads and cache: what was written must lie below float32's likeliest
no farther than plain bfloat16 does, on average and at most, but for SLACK. This is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import training

CONTENDERS = {
    "peer": "generate, batches of 8, unsorted, float32",
    "float32": "peftlab, float32",
    "bfloat16": "peftlab, bfloat16",
}
SLACK = 1.5
"""How many times as far as a plain pass's a token written in bfloat16 may lie below float32's likeliest."""
LOOKED_UP = 32
"""Answers in bfloat16 that are looked up in float32."""


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--lengths", choices=["references", "longest"], default="references")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="contenders beside the peer")
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    prompts, lengths, tokenizer = make_prompts(options)
    names = [n for n in CONTENDERS if n == "peer" or not options.only or n in options.only]
    models = {kind: make_model(tokenizer, kind, options) for kind in ("float32", *names[1:])}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    written: dict[str, dict[int, list[int]]] = {}
    for _ in range(options.repeats):
        for name in names:
            written[name] = {}
            began = time.perf_counter()
            if name == "peer":
                by_generate(models["float32"], tokenizer, prompts, lengths, written[name], options)
            else:
                by_peftlab(models[name], tokenizer, prompts, lengths, written[name], options)
            seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    tell(prompts, seconds, written, models, options)


def tell(
    prompts: list[list[int]],
    seconds: dict[str, list[float]],
    written: dict[str, dict[int, list[int]]],
    models: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Compare what was written, print the table, write JSON where asked."""
    print("| | seconds | times as fast | tokens | answers as the peer's |\n|---|---:|---:|---:|---:|")
    rows: dict[str, dict[str, Any]] = {}
    for name in seconds:
        ratio = statistics.median(a / b for a, b in zip(seconds["peer"], seconds[name], strict=True))
        tokens = sum(len(row) for row in written[name].values())
        same = sum(written[name][i] == written["peer"][i] for i in range(len(prompts)))
        rows[name] = {"seconds": seconds[name], "ratio": ratio, "tokens": tokens, "same_answers": same}
        median = statistics.median(seconds[name])
        print(f"| {CONTENDERS[name]} | {median:.1f} | {ratio:.2f} x | {tokens} | {same} of {len(prompts)} |")
    if rows.get("float32", rows["peer"])["same_answers"] != len(prompts):
        raise SystemExit("answers in float32 differ from those of generate")
    if "bfloat16" in rows:
        found = look_up(models["float32"], models["bfloat16"], prompts, written["bfloat16"])
        rows["bfloat16"] |= {"below": {name: max(below) for name, below in found.items()}}
        print()
        for name, below in found.items():
            likeliest = sum(one == 0 for one in below) / len(below)
            print(
                f"{name}: {likeliest:.1%} of {len(below)} tokens are float32's likeliest, the others below it by at most"
                f" {max(below):.3f} of the logits' range, all by {statistics.mean(below):.5f} on average"
            )
        made, plain = found.values()
        if max(made) > SLACK * max(plain) or statistics.mean(made) > SLACK * statistics.mean(plain):
            raise SystemExit("what was written in bfloat16 is farther from float32 than bfloat16 itself is")
    if options.output:
        from peftlab.devices import describe_environment

        record = {"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_prompts(options: argparse.Namespace) -> tuple[list[list[int]], list[int], Any]:
    """The test split's prompts in their order, the tokens of their first references with the end, and the tokenizer."""
    from transformers import AutoTokenizer

    from peftlab.batches import RowBuilder
    from peftlab.catalog import TASKS
    from peftlab.config import EMBEDDED_BASE, TaskSettings
    from peftlab.model_names import SHORT_NAMES
    from peftlab.task_data import load_splits

    name = "e2e_nlg" if options.data_dir else "embedded"
    splits = load_splits(TaskSettings(name=name, data_dir=options.data_dir), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or SHORT_NAMES[EMBEDDED_BASE])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    builder = RowBuilder(
        tokenizer, prompt=TASKS.load(name).PROMPT, head="causal", max_length=training.LONGEST
    )
    examples = splits.test[: options.prompts]
    rows = [builder.prompt_ids(e.source, room=training.LONGEST) for e in examples]
    longest = [options.new_tokens] * len(rows)
    if options.lengths == "longest":
        return rows, longest, tokenizer
    own = [len(tokenizer(f" {e.references[0]}", add_special_tokens=False).input_ids) + 1 for e in examples]
    return rows, [min(pair) for pair in zip(own, longest, strict=True)], tokenizer


def make_model(tokenizer: Any, kind: str, options: argparse.Namespace) -> Any:
    """A Llama with LoRA, the same numbers in each dtype."""
    import torch

    from peftlab.catalog import METHODS
    from peftlab.mapping import map_model

    torch.manual_seed(0)
    model = training.make_model(tokenizer, options)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)  # so that the next token depends on what stands before
    leaf = METHODS.load("lora")
    settings = leaf.Settings(rank=training.RANK, alpha=training.ALPHA, targets="both", dropout=0.0)
    model = model.to(getattr(torch, kind)).eval()
    attached = leaf.attach(model, map_model(model), settings, head="causal", seed=0)
    with torch.no_grad():
        for name, parameter in attached.parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return attached.model.eval()


class EndAt:
    """A logits processor that ends each answer after so many tokens, its end among them, and notes what was written.

    Args:
        numbers: What the rows of the batch are called.
        lengths: Of all answers.
        end_id: The token that ends an answer.
        written: Where the tokens of each answer go, without the end.
    """

    def __init__(
        self, numbers: Sequence[int], lengths: list[int], end_id: int, written: dict[int, list[int]]
    ) -> None:
        self.rows, self.lengths, self.end_id, self.written = list(numbers), lengths, end_id, written
        self.begins = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """End what has its length; nothing else ends."""
        import torch

        self.begins = self.begins or input_ids.shape[1]
        made = input_ids.shape[1] - self.begins
        scores[:, self.end_id] = -torch.inf
        over = [place for place, row in enumerate(self.rows) if self.lengths[row] - 1 <= made]
        scores[over, self.end_id] = torch.finfo(scores.dtype).max
        for place in over:
            if self.lengths[self.rows[place]] - 1 == made:
                self.written[self.rows[place]] = input_ids[place, self.begins :].tolist()
        return scores

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone."""
        self.rows = [self.rows[row] for row in rows]


def by_generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    lengths: list[int],
    written: dict[int, list[int]],
    options: argparse.Namespace,
) -> None:
    """Answers as people get them: batches of 8 in the order of the file, padded on the left."""
    import torch

    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), 8):
        batch = tokenizer.pad({"input_ids": prompts[start : start + 8]}, return_tensors="pt")
        numbers = range(start, start + len(batch["input_ids"]))
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model.generate(
                **batch, max_new_tokens=options.new_tokens, do_sample=False,
                logits_processor=[EndAt(numbers, lengths, tokenizer.eos_token_id, written)],
            )  # fmt: skip
        tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def by_peftlab(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    lengths: list[int],
    written: dict[int, list[int]],
    options: argparse.Namespace,
) -> None:
    """Answers as a run's evaluation gets them."""
    from peftlab.generation import generate

    with ended_by(lambda ids: EndAt([int(i) for i in ids], lengths, tokenizer.eos_token_id, written)):
        generate(
            model, tokenizer, prompts, head="causal", max_new_tokens=options.new_tokens, batch_size=None,
            tell=lambda why: print(why, file=sys.stderr),
        )  # fmt: skip


@contextmanager
def ended_by(make: Callable[[Sequence[str]], EndAt]) -> Iterator[None]:
    """A context in which peftlab's answers have one more logits processor, made from the names of a batch's rows."""
    from peftlab import generation

    own = generation.make_draws
    generation.make_draws = lambda decoding, ids, seed: [make(ids), *own(decoding, ids, seed)]
    try:
        yield
    finally:
        generation.make_draws = own


def look_up(
    exact: Any, half: Any, prompts: list[list[int]], written: dict[int, list[int]]
) -> dict[str, list[float]]:
    """How far tokens lie below the likeliest in the logits of the float32 model, in their range, behind the same text.

    Returns:
        Of the tokens that were written in bfloat16, and of those that the bfloat16 model likes best in one plain pass.
    """
    import torch

    found: dict[str, list[float]] = {"written in bfloat16": [], "a plain pass in bfloat16": []}
    for number in range(0, len(prompts), max(1, len(prompts) // LOOKED_UP)):
        answer = torch.tensor(written[number], dtype=torch.long)
        ids = torch.cat([torch.tensor(prompts[number]), answer])[None]
        with torch.no_grad():
            logits, rounded = (
                model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
                for model in (exact, half)
            )
        end = exact.config.eos_token_id  # no answer ends by itself here
        lowest = logits.min(dim=-1).values
        logits[:, end], rounded[:, end] = -torch.inf, -torch.inf
        highest = logits.max(dim=-1).values
        for name, chosen in zip(found, (answer, rounded.argmax(dim=-1)), strict=True):
            height = logits.gather(1, chosen[:, None])[:, 0]
            found[name] += ((highest - height) / (highest - lowest)).tolist()
    return found


if __name__ == "__main__":
    main()
