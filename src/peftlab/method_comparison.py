"""A finished run as a result file of peft's method_comparison, so that its viewers show it beside peft's own.

Every field is what was measured or set here, or None where there is no such thing:

| field | why None |
|---|---|
| peft_branch, *-commit-hash, model_info, dataset_info, pytorch_info | installed packages have none, or no run notes it |
| accelerator_memory_* on a GPU | a run notes allocated bytes, theirs are reserved ones; without an accelerator they are 0 |
| valid accuracy, eval time, mem * avg | a run's validation gives a loss |
| test accuracy | the task has no metric that is an accuracy; the scores stand beside it as "test NAME" |
| forgetting | not measured |
| lr_scheduler | theirs knows "cosine" and None (a constant rate); another curve stands by its own name |

Their viewers turn `accelerator_memory_*` into whole numbers and refuse None there: they show runs on a CPU as they are, and
runs on a GPU once these three are filled in by hand.

Source: huggingface/peft, method_comparison: MetaMathQA/utils.py `log_results` writes the layout, processing.py reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.errors import InputError, RunError
from peftlab.files import write_json
from peftlab.measurements import mean_and_std
from peftlab.run import RunFolder

ACCURACIES = (
    "accuracy",
    "label_accuracy",
    "exact_match",
    "exact_match_stripped",
    "logical_form",
    "execution_accuracy",
)
"""Metrics that are the share of right answers."""
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
FULL = "full"
_OPTIMIZERS = {"adamw": "AdamW", "lora_plus": "lora+", "lora_fa": "lora-fa"}
_ADAPTER, _TENSORS, _MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"


def find_finished(reference: str, directory: Path) -> RunFolder:
    """A finished run that the layout has a place for.

    Args:
        reference: The run's path, its name, or "last".
        directory: Where run folders lie.

    Returns:
        The run.

    Raises:
        InputError: There is no such run, it has not finished or scored nothing, or its method is none of peft's.
    """
    run = RunFolder.find(reference, directory)
    if not run.is_finished:
        raise InputError(
            f"the run {run.path} has not finished, so it is no result yet; go on with it: peftlab run --resume {run.path}"
        )
    methods = [str(adapter["method"]) for adapter in run.config.get("adapters", [])]
    if len(methods) != 1:
        raise InputError(
            f"the run {run.path} has {len(methods)} adapters ({', '.join(methods)}), and a result of peft's"
            " method_comparison is of one"
        )
    if methods[0] != FULL and not (run.final_model / _ADAPTER).is_file():
        raise InputError(
            f"the run {run.path} is of the method {methods[0]}, which is none of peft's: its method_comparison would show it"
            " as full fine-tuning"
        )
    return run


def experiment_name(run: RunFolder) -> str:
    """What the viewers call a run, e.g. "lora/embedded-lora-both-1a2b3c4d".

    Args:
        run: A finished run.
    """
    return f"{run.config['adapters'][0]['method'].replace('_', '-')}/{run.name}"


def peft_result(run: RunFolder, half: Mapping[str, Any] | None) -> dict[str, Any]:
    """A run in the layout of peft's method_comparison.

    Args:
        run: A finished run, from `find_finished`.
        half: What stands under "after" in an evaluation of its final model; None where it was not scored.

    Returns:
        JSON-ready.

    Raises:
        RunError: A file of the run is damaged.
    """
    summary, config = run.summary(), run.config
    events = run.timeline()
    metrics = [*_progress(run, events), _outcome(run, events, half)]
    full = config["adapters"][0]["method"] == FULL
    started = [event for event in run.events() if event["event"] == "run_started"]
    files = sorted(run.final_model.glob("*.safetensors")) if full else [run.final_model / _TENSORS]
    on_device = summary["peak_memory_bytes"]["device"] is not None
    memory = None if on_device else 0  # without an accelerator none of its memory is taken
    return {
        "run_info": {
            "created_at": started[0]["time"] if started else None,
            "total_time": summary["seconds"].get("total"),
            "experiment_name": experiment_name(run),
            "peft_branch": None,
            "train_config": _train_config(run, events, (half or {}).get("decoding") or {}),
            "peft_config": None if full else _read(run.final_model / _ADAPTER),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": summary["seconds"].get("train"),
            "file_size": sum(file.stat().st_size for file in files),
            "num_trainable_params": summary["counts"]["trainable_parameters"],
            "num_total_params": summary["counts"]["total_parameters"],
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": _meta(run, str(config["task"]["name"])),
    }


def write_peft_result(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result under the name that the viewers' folder has for it.

    Args:
        result: From `peft_result`.
        folder: Where; it must be there.

    Returns:
        `METHOD--RUN.json` in the folder.

    Raises:
        OutputError: It cannot be written.
    """
    name = str(result["run_info"]["experiment_name"]).replace("/", "--")
    return write_json(folder / f"{name}.json", dict(result))


def _train_config(
    run: RunFolder, events: Sequence[Mapping[str, Any]], decoding: Mapping[str, Any]
) -> dict[str, Any]:
    """How it was trained, and how its answers were decoded."""
    config = run.config
    model, task, training = config["model"], config["task"], config["training"]
    evaluation = config.get("evaluation") or {}
    own = config["adapters"][0].get("settings") or {}
    validated = [event["step"] for event in events if event["event"] == "validated"]
    noted = [
        str(e["dtype"]).partition(":")[0]
        for e in run.events()
        if e["event"] == "run_started" and "dtype" in e
    ]
    dtype = model.get("dtype")
    manifest = _read(run.final_model / _MANIFEST) if (run.final_model / _MANIFEST).is_file() else {}
    template = (manifest.get("template") or {}).get("text")
    curve = training.get("curve")
    generation = ("max_new_tokens", "num_beams", "length_penalty", "temperature", "top_k", "top_p")
    return {
        "model_id": model["name"],
        "dtype": noted[0] if noted else None if dtype == "auto" else dtype,
        "max_seq_length": task.get("max_length"),
        "batch_size": run.preflight["steps"]["rows_per_step"],
        "batch_size_eval": evaluation.get("batch_size"),
        "max_steps": training["max_steps"],
        "eval_steps": training.get("validation_steps") or (validated[0] if validated else None),
        "compile": False,
        "use_gc": bool(model.get("gradient_checkpointing")),
        "query_template": None if template is None else template.replace("{source}", "{query}"),
        "seed": training.get("seed"),
        "grad_norm_clip": training.get("clip_norm"),
        "optimizer_type": _OPTIMIZERS.get(str(own.get("optimizer", "adamw"))),
        "optimizer_kwargs": {
            "lr": training.get("learning_rate"),
            "weight_decay": training.get("weight_decay"),
        },
        "lr_scheduler": None if curve == "constant" else curve,
        "use_amp": False,
        "autocast_adapter_dtype": None,
        "generation_kwargs": {n: decoding[n] for n in generation if decoding.get(n) is not None},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _progress(run: RunFolder, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each validation."""
    found: list[dict[str, Any]] = []
    steps = [event for event in events if event["event"] == "step"]
    begin, seconds = 0, 0.0
    for event in events:
        if event["event"] != "validated":
            continue
        inside = [s for s in steps if begin < s["step"] <= event["step"]]
        until = inside[-1].get("seconds") if inside else None
        found.append(
            {
                "step": event["step"],
                "valid accuracy": None,
                "valid loss": event["validation_loss"],
                **_trained(run, inside, event["step"]),
                "train time": None
                if until is None or until < seconds
                else until - seconds,  # a resumed run counts anew
                "eval time": None,
                "tokens / sec": inside[-1].get("tokens_per_second") if inside else None,
                "mem allocated avg": None,
                "mem reserved avg": None,
                "elapsed time": until,
            }
        )
        begin, seconds = event["step"], seconds if until is None else until
    return found


def _outcome(
    run: RunFolder, events: Sequence[Mapping[str, Any]], half: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The entry that the viewers read: the last one."""
    steps = [event for event in events if event["event"] == "step"]
    validated = [event["step"] for event in events if event["event"] == "validated"]
    last = int(run.summary()["steps"])
    begin = max((step for step in validated if step < last), default=0)
    scores = {name: score["value"] for name, score in (half or {}).get("metrics", {}).items()}
    accuracy = next((value for name, value in scores.items() if name in ACCURACIES), None)
    tokens = steps[-1].get("tokens") if steps else None
    return {
        "step": last,
        "test accuracy": accuracy,
        **_trained(run, [s for s in steps if begin < s["step"] <= last], last),
        "train total tokens": tokens,
        "forgetting": None,
        **{f"test {name}": value for name, value in scores.items()},
    }


def _trained(run: RunFolder, steps: Sequence[Mapping[str, Any]], last: int) -> dict[str, Any]:
    """Mean loss of some steps, and the rows trained on up to the last."""
    losses = [float(step["loss"]) for step in steps]
    rows = run.preflight["steps"]["rows_per_step"]
    return {"train loss": mean_and_std(losses)[0] if losses else None, "train samples": last * rows}


def _meta(run: RunFolder, task: str) -> dict[str, Any]:
    """Versions and hardware."""
    found = run.environment
    hardware = found["hardware"]
    devices = hardware.get("devices") or []
    packages: dict[str, Any] = {}
    for name in PACKAGES:
        version = found["versions"].get(name)
        packages[f"{name}-version"] = None if version is None or "not installed" in version else version
        packages[f"{name}-commit-hash"] = None
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {task: {"sha": None, "created_at": None}},
        "package_info": packages,
        "system_info": {
            "system": str(hardware["platform"]).partition("-")[0],
            "release": None,
            "version": None,
            "machine": None,
            "processor": hardware.get("processor"),
            "accelerator": devices[0] if devices else None,
        },
        "pytorch_info": None,
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the final model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: a mapping is expected, not {type(found).__name__}")
    return found
