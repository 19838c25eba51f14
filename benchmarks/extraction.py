"""Activations of a middle layer for texts of mixed length: the loop that people write, peers, and peftlab, in one run.

    python benchmarks/extraction.py --output extraction.json

The model is GPT-2 with random weights, the texts are random words with log-normal lengths. The naive loop is a whole forward
pass with `output_hidden_states=True` over batches of 16 in the order of the texts, padded to the longest. Peers run twice:
over the same batches, and over batches that are sorted by length to a budget of tokens, as peftlab's are. Every contender
is first held against the naive loop on some texts, then timed on all of them, then held against it on all.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from peftlab.devices import describe_environment
from peftlab.inspection.activations import extract_activations

Extraction = Callable[[list[str]], list[torch.Tensor]]
"""From texts to the activations of each, (tokens, hidden)."""

CHECKED = 32
"""Texts that every contender is checked on before it is timed."""


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    options = read_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    tokenizer = make_tokenizer(options.vocabulary)
    model = make_model(options).to(device)
    texts = make_texts(options)
    lengths = [len(text.split()) for text in texts]
    layer = options.layer if options.layer is not None else options.layers // 2
    if not 0 <= layer < options.layers - 1:
        raise SystemExit(
            f"--layer {layer} of {options.layers}: give one before the last, which transformers gives after the final norm"
        )
    print(
        f"GPT-2 with {options.layers} layers of {options.hidden}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M"
        f" parameters; layer {layer}; {len(texts)} texts, {sum(lengths)} tokens (longest {max(lengths)});"
        f" {device}, {options.threads} threads"
    )
    measured = measure(contenders(model, tokenizer, layer, options), texts, options.repeats)
    if options.output:
        record = {
            "options": vars(options) | {"output": str(options.output), "layer": layer},
            "tokens": sum(lengths),
            "rows": measured,
            "environment": describe_environment(Path(__file__).parent),
            "peers": {name: version(name) for name in ("nnsight", "transformer_lens")},
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--layer", type=int, help="the layer extracted; default: the middle one")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--mean_log_length", type=float, default=3.5)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16, help="of the naive loop")
    parser.add_argument("--batch_tokens", type=int, default=2048, help="of peftlab and sorted peers")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", help="contenders whose names begin so; the naive loop always runs"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def make_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of whole words w3, w4, ...; saved and loaded once, because TransformerLens loads it again by its path."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", pad_token="w1", bos_token="w2", eos_token="w2"
    )
    folder = tempfile.mkdtemp(prefix="extraction_tokenizer_")
    tokenizer.save_pretrained(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.init_kwargs.setdefault("name_or_path", folder)
    return loaded


def make_model(options: argparse.Namespace) -> Any:
    """GPT-2 with random weights."""
    config = transformers.GPT2Config(
        vocab_size=options.vocabulary,
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=max(1, options.hidden // 64),
        n_positions=max(1024, options.longest),
        bos_token_id=2,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def make_texts(options: argparse.Namespace) -> list[str]:
    """Texts of random words with log-normal lengths (sigma 0.9)."""
    source = np.random.default_rng(options.seed)
    lengths = (
        np.exp(source.normal(options.mean_log_length, 0.9, options.texts))
        .astype(int)
        .clip(4, options.longest)
    )
    return [" ".join(f"w{i}" for i in source.integers(3, options.vocabulary, n)) for n in lengths]


def contenders(
    model: Any, tokenizer: Any, layer: int, options: argparse.Namespace
) -> dict[str, Extraction | str]:
    """Name to a way of extraction, or to why it cannot run here."""
    plain = lambda texts: plain_batches(len(texts), options.batch_size)  # noqa: E731
    budget = lambda texts: sorted_batches(texts, options.batch_tokens)  # noqa: E731

    def looped(
        run: Callable[[Any], torch.Tensor], batches: Callable[[list[str]], list[list[int]]]
    ) -> Extraction:
        return lambda texts: loop(run, tokenizer, texts, batches(texts), model.device)

    def naive(inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).hidden_states[layer + 1]

    def peftlab(texts: list[str]) -> list[torch.Tensor]:
        found = extract_activations(model, tokenizer, texts, [layer], batch_tokens=options.batch_tokens)
        return [found[f"layer_{layer}"][found.rows_of(i)] for i in range(len(texts))]

    def peftlab_to_disk(texts: list[str]) -> list[torch.Tensor]:
        with tempfile.TemporaryDirectory(prefix="extraction_") as folder:
            found = extract_activations(
                model, tokenizer, texts, [layer], batch_tokens=options.batch_tokens, output=folder
            )
            rows = [np.array(found[f"layer_{layer}"][found.rows_of(i)]) for i in range(len(texts))]
        return [torch.from_numpy(row) for row in rows]

    ways: dict[str, Extraction | str] = {"naive loop": looped(naive, plain)}
    for name, make in {"nnsight": nnsight_runner, "transformer_lens": transformer_lens_runner}.items():
        if importlib.util.find_spec(name) is None:
            ways[name] = "not installed here"
            continue
        try:
            run = make(model, copy.deepcopy(tokenizer), layer)  # some set its padding side
        except Exception as error:  # noqa: BLE001 - whatever stops a peer belongs into the table
            ways[name] = f"does not start: {type(error).__name__}: {error}"
            continue
        ways[f"{name} {version(name)}, same batches"] = looped(run, plain)
        ways[f"{name} {version(name)}, sorted batches"] = looped(run, budget)
    ways |= {"peftlab": peftlab, "peftlab, to disk": peftlab_to_disk}
    chosen = tuple(options.only or ("",))
    return {name: way for name, way in ways.items() if name == "naive loop" or name.startswith(chosen)}


def plain_batches(num_texts: int, size: int) -> list[list[int]]:
    """Batches in the order of the texts."""
    return [list(range(start, min(start + size, num_texts))) for start in range(0, num_texts, size)]


def sorted_batches(texts: list[str], budget: int) -> list[list[int]]:
    """Batches of texts of like length, of so many tokens with their pads."""
    lengths = [len(text.split()) for text in texts]
    made: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: -lengths[i]):
        if not made or (len(made[-1]) + 1) * lengths[made[-1][0]] > budget:
            made.append([])
        made[-1].append(i)
    return made


def loop(
    run: Callable[[Any], torch.Tensor],
    tokenizer: Any,
    texts: list[str],
    batches: list[list[int]],
    device: Any,
) -> list[torch.Tensor]:
    """Run batches, keep the rows of real tokens on the host, in the order of the texts."""
    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt").to(device)
        hidden = run(inputs).detach().cpu()
        for i, states, mask in zip(batch, hidden, inputs["attention_mask"].bool().cpu(), strict=True):
            found[i] = states[mask]
    return [found[i] for i in range(len(texts))]


def nnsight_runner(model: Any, tokenizer: Any, layer: int) -> Callable[[Any], torch.Tensor]:
    """One batch through nnsight, stopped after the layer."""
    from nnsight import TransformersModel

    traced = TransformersModel(model, tokenizer=tokenizer, task="text-generation")

    def run(inputs: Any) -> torch.Tensor:
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.no_grad(), traced.trace(given) as tracer:
            output = traced.transformer.h[layer].output.save()
            tracer.stop()
        return output if isinstance(output, torch.Tensor) else output[0]

    return run


def transformer_lens_runner(model: Any, tokenizer: Any, layer: int) -> Callable[[Any], torch.Tensor]:
    """One batch through TransformerLens' bridge, stopped after the layer; on a copy, as it changes the model's modules."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "gpt2",
        hf_model=copy.deepcopy(model),
        tokenizer=tokenizer,
        device=str(model.device),
        dtype=torch.float32,
    )
    name = f"blocks.{layer}.hook_out"

    def run(inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                names_filter=name,
                stop_at_layer=layer + 1,
            )
        return cache[name]

    return run


def measure(ways: dict[str, Extraction | str], texts: list[str], repeats: int) -> list[dict[str, Any]]:
    """Check and time every contender and print its row; the first one is what the others are held against."""
    first = next(iter(ways.values()))
    assert not isinstance(first, str)
    expected = first(texts[:CHECKED])
    whole: list[torch.Tensor] = []
    measured: list[dict[str, Any]] = []
    width = max(len(name) for name in ways)
    print(f"{'':{width}}  seconds  x naive  largest difference")
    for name, way in ways.items():
        row: dict[str, Any] = {"name": name}
        try:
            if isinstance(way, str):
                raise RuntimeError(way)
            check(way(texts[:CHECKED]), expected)
            row["seconds"], found = min((timed(way, texts) for _ in range(repeats)), key=lambda pair: pair[0])
            whole = whole or found
            row["largest_difference"] = check(found, whole)
            row["times_naive"] = (measured or [row])[0]["seconds"] / row["seconds"]
            figures = f"{row['seconds']:7.2f}  {row['times_naive']:7.2f}  {row['largest_difference']:.1e}"
        except Exception as error:  # noqa: BLE001 - a contender that fails is a row that says so
            figures = row["problem"] = way if isinstance(way, str) else f"{type(error).__name__}: {error}"
        print(f"{name:{width}}  {figures}", flush=True)
        measured.append(row)
    return measured


def timed(way: Extraction, texts: list[str]) -> tuple[float, list[torch.Tensor]]:
    """Seconds of one extraction, and what it gave."""
    start = time.perf_counter()
    found = way(texts)
    return time.perf_counter() - start, found


def check(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference; raises where it is above 1e-4 of the largest value, or a shape differs."""
    largest = max(float(value.abs().max()) for value in expected)
    difference = max(float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(found, expected, strict=True))
    if not difference <= 1e-4 * largest:
        raise ValueError(f"differs from the naive loop by {difference:.2e} (largest value {largest:.2e})")
    return difference


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
