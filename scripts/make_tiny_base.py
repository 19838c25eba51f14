"""Make `peftlab/assets/tiny_base`: a Llama of two million parameters and its tokenizer, from made-up text.

    python scripts/make_tiny_base.py                 # the base in the package: half an hour on two idle cores
    python scripts/make_tiny_base.py --quick --out X # a few steps, for the test

The text comes from `tiny_base_corpus.py` (rules, a seed, no network), the tokenizer is a byte-level BPE trained
on it. The same seed, steps, threads and software give the same bytes on the same kind of CPU;
`make_tiny_base.log` holds versions, losses and the sums of the files. The base has seen records in many notations
and twelve domains put into words, but neither the embedded task's domain nor its notation: what it brings is
copying, what fine-tuning adds is the task.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tiny_base_corpus import Document, generate
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "src" / "peftlab" / "assets" / "tiny_base"
END, PAD = "<|end|>", "<|pad|>"
HEAD_WEIGHT = 0.3  # of a record's own tokens in the loss: mostly chance, but they teach the words
IGNORED = -100
# A lower-case word takes the space before it, a name does not: a name has the same tokens wherever it stands.
PIECES = r" ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}| ?[^\s\p{L}\p{N}]+|\s|\p{L}"


@dataclass(frozen=True, slots=True)
class Size:
    """What is made, and from how much.

    Attributes:
        vocabulary: Tokens of the tokenizer.
        hidden: Width of the model.
        layers: Number of blocks.
        heads: Attention heads.
        key_value_heads: Heads of keys and values.
        intermediate: Width inside the MLP.
        documents: Documents drawn from the corpus.
        batch_tokens: Tokens in a batch, padding included.
        peak_rate: Highest learning rate of AdamW (embedding, norms).
        peak_matrix_rate: Highest learning rate of Muon (the matrices of the blocks).
    """

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 6
    intermediate: int = 512
    documents: int = 60_000
    batch_tokens: int = 3072
    peak_rate: float = 3e-3
    peak_matrix_rate: float = 0.02


QUICK = Size(
    vocabulary=400,
    hidden=32,
    layers=1,
    heads=2,
    key_value_heads=1,
    intermediate=64,
    documents=200,
    batch_tokens=512,
)


def train_tokenizer(documents: list[Document], size: Size) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE.

    Args:
        documents: The corpus, or the first part of it.
        size: Says how many tokens.

    Returns:
        The tokenizer, with an end and a padding token; nothing is added to a text by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary, special_tokens=[END, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator((f"{head} {text}" for head, text in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """A freshly initialised Llama of this size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


Row = tuple[list[int], int]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """Token ids of each document with its end token, and how many of them are its head."""
    heads = tokenizer([head for head, _ in documents])["input_ids"]
    texts = tokenizer([f" {text}" for _, text in documents])["input_ids"]
    return [([*h, *t, tokenizer.eos_token_id], len(h)) for h, t in zip(heads, texts, strict=True)]


def batches(rows: list[Row], *, size: Size, pad: int, seed: int) -> Iterator[Batch]:
    """Batches without end, each of rows of about one length.

    Args:
        rows: From `encode`.
        size: Says how many tokens a batch has.
        pad: The padding id.
        seed: Seeds the order.

    Yields:
        Ids, labels and loss weights, each (batch, seq); rows are padded on the right.
    """
    rng = random.Random(seed)
    rows = [(ids[:256], head) for ids, head in rows]
    while True:
        rng.shuffle(rows)
        for start in range(0, len(rows), 1024):
            pool = sorted(rows[start : start + 1024], key=lambda row: len(row[0]))
            groups: list[list[Row]] = [[]]
            for row in pool:
                if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > size.batch_tokens:
                    groups.append([])
                groups[-1].append(row)
            rng.shuffle(groups)
            for group in groups:
                width = max(len(ids) for ids, _ in group)
                yield (
                    torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
                    torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids, _ in group]),
                    torch.tensor([[HEAD_WEIGHT] * head + [1.0] * (width - head) for _, head in group]),
                )


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the next token, heads weighing less; and that of the texts alone."""
    ids, labels, weights = batch
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )
    weights = weights[:, 1:] * (labels[:, 1:] != IGNORED)
    texts = losses.detach()[weights == 1.0].mean().item()
    return (losses * weights).sum() / weights.sum(), texts


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up over 30 steps, flat for six tenths, then a line to nothing."""
    return min(1.0, (step + 1) / 30, 2.5 * (1 - step / steps))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix with orthonormal rows or columns, by five Newton-Schulz steps in fp32.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". `torch.optim.Muon` does
    this in bfloat16, which CPUs without bf16 instructions do fifteen times slower.

    Args:
        matrix: The matrix, (out, in).

    Returns:
        The matrix with all singular values near 1.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


@torch.no_grad()
def muon_step(matrices: list[torch.nn.Parameter], momenta: list[torch.Tensor], *, rate: float) -> None:
    """One step of Muon with Nesterov momentum 0.95 and weight decay 0.05."""
    for matrix, momentum in zip(matrices, momenta, strict=True):
        assert matrix.grad is not None
        momentum.mul_(0.95).add_(matrix.grad)
        matrix.mul_(1 - 0.05 * rate)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        matrix.sub_(orthogonalized(matrix.grad + 0.95 * momentum), alpha=rate * scale)


def pretrain(
    model: LlamaForCausalLM, data: Iterator[Batch], *, size: Size, steps: int, tell: Callable[[str], None]
) -> LlamaForCausalLM:
    """Train the whole model: the matrices of the blocks with Muon, the rest with AdamW.

    Args:
        model: The model, changed in place.
        data: Batches without end.
        size: Says the highest learning rates.
        steps: Optimizer steps.
        tell: Takes lines for the log.

    Returns:
        The model.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in matrices}
    others = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in chosen],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    momenta = [torch.zeros_like(p) for p in matrices]
    started, every, total, seen = time.perf_counter(), min(50, steps), 0.0, 0
    for step in range(steps):
        rate = rate_at(step, steps)
        for group in others.param_groups:
            group["lr"] = rate * size.peak_rate
        batch = next(data)
        loss, text_loss = weighted_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        others.step()
        muon_step(matrices, momenta, rate=rate * size.peak_matrix_rate)
        model.zero_grad()
        total, seen = total + text_loss, seen + batch[0].numel()
        if (step + 1) % every == 0:
            seconds = time.perf_counter() - started
            tell(
                f"step {step + 1:5d}  loss on texts {total / every:.4f}  tokens {seen}  seconds {seconds:.0f}"
            )
            total = 0.0
    return model


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path
) -> dict[str, tuple[int, str]]:
    """Write model (bfloat16 safetensors) and tokenizer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        out: The folder.

    Returns:
        For each file its bytes and its sha256.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    files = sorted(p for p in out.iterdir() if p.is_file())
    return {p.name: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}


def main() -> None:
    """Read the flags, make the base, write the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads; another number gives other last bits"
    )
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument(
        "--log", type=Path, help="default: beside this script for the shipped base, else beside --out"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny size and three steps, for the test")
    asked = parser.parse_args()
    size, steps = (QUICK, 3) if asked.quick else (Size(), asked.steps)
    shipped = asked.out == SHIPPED and not asked.quick
    log = asked.log or (Path(__file__).with_suffix(".log") if shipped else asked.out.with_suffix(".log"))
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")

    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    torch.use_deterministic_algorithms(True)
    tell(f"python {platform.python_version()}, torch {torch.__version__}, "
         f"transformers {transformers.__version__}, "
         f"tokenizers {tokenizers.__version__}, {platform.machine()}, {asked.threads} threads")  # fmt: skip
    documents = generate(size.documents, seed=asked.seed)
    tokenizer = train_tokenizer(documents[:20_000], size)
    rows = encode(documents, tokenizer)
    model = build_model(tokenizer, size)
    tell(f"seed {asked.seed}, steps {steps}, {size}")
    tell(f"corpus: {len(documents)} documents, {sum(len(h) + len(t) for h, t in documents)} characters, "
         f"{sum(len(ids) for ids, _ in rows)} tokens; parameters: {model.num_parameters()}")  # fmt: skip
    started = time.perf_counter()
    data = batches(rows, size=size, pad=tokenizer.pad_token_id, seed=asked.seed)
    pretrain(model, data, size=size, steps=steps, tell=tell)
    tell(f"pretraining took {time.perf_counter() - started:.0f} seconds")
    for name, (num_bytes, digest) in save(model, tokenizer, asked.out).items():
        tell(f"{digest}  {num_bytes:8d}  {name}")


if __name__ == "__main__":
    main()
