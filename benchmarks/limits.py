"""What this machine can do at most: products, memory, attention and an optimizer's step, at the shapes of `training.py`.

    python benchmarks/limits.py --output limits.json

No training is faster than its products at the speed of the fastest product, nor an optimizer than memory gives its
tensors. Each thing is done often enough to last, the fastest counts (a ceiling, not a mean), and both dtypes and all shapes
take turns, so that a machine that others use slows all of them. `training.py` takes its limit from `product_speeds`. On a
GPU the same is measured there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
TURNS = 5
LASTING = 0.02
"""Seconds that one measurement takes at least, so that the clock and a kernel's start do not count."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of activations (rows, inner) and a weight (outer, inner).

    Attributes:
        name: What it is in the work.
        rows: Rows of the activations.
        inner: Features in.
        outer: Features out.
    """

    name: str
    rows: int
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.outer


def products(*, tokens: int, labelled: int, hidden: int, vocabulary: int) -> list[Product]:
    """The products of a Llama's step as `training.py` has it, and large ones, of which one is the machine's fastest.

    Args:
        tokens: Of a step.
        labelled: Of these, with a label.
        hidden: Features.
        vocabulary: Tokens that the head scores.

    Returns:
        The products forwards; backwards they are the same with inner and outer exchanged.
    """
    wide = 4 * hidden * 2 // 3
    return [
        Product("large, 1024 x 2048 x 2048", 1024, 2048, 2048),
        Product("large, 2048 x 4096 x 4096", 2048, 4096, 4096),
        Product("queries, keys, values, outputs", tokens, hidden, hidden),
        Product("gate, up", tokens, hidden, wide),
        Product("down", tokens, wide, hidden),
        Product("head at labelled tokens", labelled, hidden, vocabulary),
        Product("adapter's A, rank 8", tokens, hidden, 8),
        Product("adapter's B, rank 8", tokens, 8, hidden),
    ]


def main() -> None:
    """Measure all, print the tables, write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=720, help="of a step; E2E's rows have about 45 each")
    parser.add_argument("--labelled", type=int, default=420)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    from peftlab.devices import choose_device, describe_environment

    device = choose_device(options.device)
    shapes = products(
        tokens=options.tokens, labelled=options.labelled, hidden=options.hidden, vocabulary=options.vocabulary
    )
    found: dict[str, Any] = {
        "device": str(device),
        "products": product_speeds(shapes, device),
        "memory": memory_speeds(device),
        "attention": attention_seconds(options.rows, options.tokens // options.rows, options.hidden, device),
        "optimizer": optimizer_seconds(adapter_size(options.layers, options.hidden), device),
    }
    print(render(found))
    if options.output:
        record = found | {"options": {k: str(v) for k, v in vars(options).items()}}
        record["environment"] = describe_environment(Path(__file__).parent)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def product_speeds(shapes: list[Product], device: Any, *, turns: int = TURNS) -> dict[str, dict[str, float]]:
    """How fast products are, forwards (x W^T) and backwards (g W).

    Args:
        shapes: The products.
        device: Where.
        turns: How often each is measured; the fastest counts.

    Returns:
        Dtype to product to GFLOP/s; "best" is the fastest of them all, in either direction.
    """
    import torch

    found: dict[str, dict[str, float]] = {dtype: {} for dtype in DTYPES}
    with torch.no_grad():
        for shape in shapes:
            actions = {}
            for name in DTYPES:
                made = {"dtype": getattr(torch, name), "device": device}
                weight = torch.randn(shape.outer, shape.inner, **made)
                rows = torch.randn(shape.rows, shape.inner, **made)
                gradient = torch.randn(shape.rows, shape.outer, **made)
                actions[name, ""] = _product(rows, weight.T)
                actions[name, ", backwards"] = _product(gradient, weight)
            for (name, way), seconds in fastest(actions, device, turns=turns).items():
                found[name][shape.name + way] = shape.flops / seconds / 1e9
    return {name: speeds | {"best": max(speeds.values())} for name, speeds in found.items()}


def _product(left: Any, right: Any) -> Callable[[], Any]:
    """The action of one product."""
    return lambda: left @ right


def memory_speeds(device: Any) -> dict[str, float]:
    """GB/s of a copy (read and written bytes) and of a sum (read bytes) over 256 MiB."""
    import torch

    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    found = fastest({"copy": lambda: target.copy_(source), "sum": source.sum}, device)
    size = source.numel() * source.element_size()
    return {"copy": 2 * size / found["copy"] / 1e9, "sum": size / found["sum"] / 1e9}


def attention_seconds(rows: int, length: int, hidden: int, device: Any) -> dict[str, dict[str, float]]:
    """Seconds of causal attention of one layer, forwards and with its backward pass, fused and by plain products."""
    import torch

    found: dict[str, dict[str, float]] = {}
    for name in DTYPES:
        shape = (rows, hidden // 64, length, 64)
        made = {"dtype": getattr(torch, name), "device": device}
        parts = [torch.randn(shape, requires_grad=True, **made) for _ in range(3)]
        above = torch.randn(shape, **made)
        hidden_scores = torch.full((length, length), float("-inf"), **made).triu(1)

        def fused(parts: list[Any] = parts) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)

        def plain(parts: list[Any] = parts, hidden_scores: Any = hidden_scores) -> Any:
            query, key, value = parts
            scores = query @ key.transpose(-1, -2) * 64**-0.5 + hidden_scores
            return scores.softmax(dim=-1) @ value

        actions = {"fused": fused, "plain": plain}
        both = {f"{way}, both ways": _backwards(action, parts, above) for way, action in actions.items()}
        found[name] = fastest(actions | both, device)
    return found


def _backwards(action: Callable[[], Any], parts: list[Any], above: Any) -> Callable[[], Any]:
    """An action with its backward pass."""
    import torch

    return lambda: torch.autograd.grad(action(), parts, above)


def optimizer_seconds(parameters: int, device: Any) -> dict[str, float]:
    """Seconds of an AdamW step over float32 parameters in 168 tensors, as an adapter has them; one way after the other."""
    import torch

    actions = {}
    for way in ("foreach", "fused"):
        tensors = [torch.randn(parameters // 168, device=device, requires_grad=True) for _ in range(168)]
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)
        actions[way] = torch.optim.AdamW(tensors, lr=1e-4, **{way: True}).step
    return fastest(actions, device)


def adapter_size(layers: int, hidden: int, rank: int = 8) -> int:
    """Parameters of a LoRA on all linear layers of a Llama."""
    wide = 4 * hidden * 2 // 3
    return layers * rank * (4 * 2 * hidden + 3 * (hidden + wide))


def fastest(actions: dict[Any, Callable[[], Any]], device: Any, *, turns: int = TURNS) -> dict[Any, float]:
    """The fewest seconds of each action; they take turns.

    Args:
        actions: What is done, by name.
        device: Where; a GPU is waited for.
        turns: How often each is measured.

    Returns:
        Name to seconds of one call.
    """
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    calls = dict.fromkeys(actions, 1)
    found = dict.fromkeys(actions, float("inf"))
    for turn in range(turns + 1):
        for name, action in actions.items():
            wait()
            began = time.perf_counter()
            for _ in range(calls[name]):
                action()
            wait()
            seconds = (time.perf_counter() - began) / calls[name]
            if turn == 0:  # the first warms up and tells how many calls last
                calls[name] = max(1, round(LASTING / max(seconds, 1e-7)))
            else:
                found[name] = min(found[name], seconds)
    return found


def render(found: dict[str, Any]) -> str:
    """The tables."""
    speeds = found["products"]
    lines = [
        f"| product, GFLOP/s on {found['device']} | float32 | bfloat16 | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, single in speeds["float32"].items():
        half = speeds["bfloat16"][name]
        lines.append(f"| {name} | {single:,.0f} | {half:,.0f} | {half / single:.2f} |")
    lines += ["", "| attention of a layer, ms | float32 | bfloat16 |", "|---|---:|---:|"]
    for name, single in found["attention"]["float32"].items():
        lines.append(f"| {name} | {single * 1e3:.2f} | {found['attention']['bfloat16'][name] * 1e3:.2f} |")
    memory, steps = found["memory"], found["optimizer"]
    lines.append(
        f"\nMemory: {memory['copy']:.1f} GB/s copied (read and written), {memory['sum']:.1f} GB/s read."
    )
    lines.append(
        f"AdamW over the adapter: {', '.join(f'{way} {s * 1e3:.1f} ms' for way, s in steps.items())}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
