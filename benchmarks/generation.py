"""Answers to E2E prompts, greedy: peftlab's evaluation against `generate` in unsorted batches of 8 in float32, in one run.

    python benchmarks/generation.py --data_dir E2E --tokenizer GPT2 --output generation.json

The model is the one of `training.py`, random weights with LoRA of rank 8 on all linear layers, its head apart from the
embedding and the end of sequence's row of the head enlarged, so that answers end after some tokens at random, as answers do;
`--end 0` has none end. Contenders take turns in one process on the same prompts; the median of the ratios counts. In float32
all must give the same answers; in bfloat16 the answers may differ, so the tokens written are told beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import training

CONTENDERS = {
    "peer": "generate, batches of 8, unsorted, float32",
    "float32": "peftlab, float32",
    "bfloat16": "peftlab, bfloat16",
}


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--end", type=float, default=2.0, help="how much larger the end's row of the head is")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data_dir", type=Path, help="folder of E2E's files; default: embedded rows")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer; default: the embedded base's")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    prompts, tokenizer = make_prompts(options)
    models = {kind: make_model(tokenizer, kind, options) for kind in ("float32", "bfloat16")}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    answers: dict[str, list[str]] = {}
    for _ in range(options.repeats):
        for name in CONTENDERS:
            began = time.perf_counter()
            if name == "peer":
                answers[name] = by_generate(models["float32"], tokenizer, prompts, options)
            else:
                answers[name] = by_peftlab(models[name], tokenizer, prompts, options)
            seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    if answers["peer"] != answers["float32"]:
        differ = sum(a != b for a, b in zip(answers["peer"], answers["float32"], strict=True))
        raise SystemExit(f"{differ} of {len(prompts)} answers in float32 differ from those of generate")
    print("| | seconds | times as fast | tokens |\n|---|---:|---:|---:|")
    rows = {}
    for name, said in CONTENDERS.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["peer"], seconds[name], strict=True))
        tokens = sum(len(row) for row in tokenizer(answers[name]).input_ids)
        rows[name] = {"seconds": seconds[name], "ratio": ratio, "tokens": tokens}
        print(f"| {said} | {statistics.median(seconds[name]):.1f} | {ratio:.2f} x | {tokens} |")
    if options.output:
        from peftlab.devices import describe_environment

        record = {"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_prompts(options: argparse.Namespace) -> tuple[list[list[int]], Any]:
    """The test split's prompts in their order, and the tokenizer."""
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
    rows = [builder.prompt_ids(e.source, room=training.LONGEST) for e in splits.test[: options.prompts]]
    return rows, tokenizer


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
        model.lm_head.weight[tokenizer.eos_token_id] *= options.end
    leaf = METHODS.load("lora")
    settings = leaf.Settings(rank=training.RANK, alpha=training.ALPHA, targets="both", dropout=0.0)
    model = model.to(getattr(torch, kind)).eval()
    return leaf.attach(model, map_model(model), settings, head="causal", seed=0).model.eval()


def by_generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace
) -> list[str]:
    """Answers as people get them: batches of 8 in the order of the file, padded on the left."""
    import torch

    found: list[str] = []
    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), 8):
        batch = tokenizer.pad({"input_ids": prompts[start : start + 8]}, return_tensors="pt")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model.generate(**batch, max_new_tokens=options.new_tokens, do_sample=False)
        found += tokenizer.batch_decode(
            made[:, batch["input_ids"].shape[1] :],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
    return [text.strip() for text in found]


def by_peftlab(
    model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace
) -> list[str]:
    """Answers as a run's evaluation gets them."""
    from peftlab.generation import generate

    return generate(
        model, tokenizer, prompts, head="causal", max_new_tokens=options.new_tokens, batch_size=None,
        tell=lambda why: print(why, file=sys.stderr),
    )  # fmt: skip


if __name__ == "__main__":
    main()
