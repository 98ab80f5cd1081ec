"""About how long each part of the pipeline takes on this machine, from one second of matrix products and copies."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from picogpt import hardware, machines, models
from picogpt.config import Experiment, load_experiment, model_file
from picogpt.data import documents, fetch
from picogpt.models.language_model import shapes_only
from picogpt.plan import Plan
from picogpt.reference import CORPUS
from picogpt.registry import MODELS

SHARE = {"train": 0.65, "char-transformer": 0.38, "forward": 0.75, "streams": 0.17, "sampling": 0.4}
"""Of the measured rate of products (of reads, for sampling), as seen on two cores of an AMD EPYC (Zen 4)."""
CHARACTERS_PER_TOKEN = 3.3
"""Of GPT-2's tokens, in tinyshakespeare."""
HELLASWAG_TOKENS = 1.6e6
"""Of all contexts, each once, and endings."""
START = 5.0
"""Seconds in which a job starts Python and torch, loads a model and writes its record."""
COMPILATION = 10.0
"""Seconds of a rung of the training ladder in torch.compile."""


def table(config: dict[str, Any], plan: Plan) -> list[tuple[str, str, str]]:
    """Rows (part, work, about how long), the last one with their sum; parts with results are `done`."""
    rates = {dtype: _products_per_second(dtype) for dtype in ("float32", "bfloat16")}
    fast, bandwidth = plan.fast_dtype, _copied_bytes_per_second()
    rates["int8"] = rates[fast]
    size = documents.size(Path(plan.text)) if Path(plan.text).exists() else fetch.registry()[CORPUS].size
    rows: list[tuple[str, str, float, Path]] = []
    for name in plan.models:
        asked, character = config[name], name.startswith("char")
        experiment = load_experiment(model_file(name if asked["config"] == "auto" else asked["config"]), asked["set"])
        tokens = size / (1 if character else CHARACTERS_PER_TOKEN)
        seen, evaluated = _tokens(experiment, 0.9 * tokens, 0.1 * tokens)
        parameters, flops = _size(experiment)
        share = SHARE.get(experiment.model.kind, SHARE["train"]) * rates[fast]
        seconds = START + seen * flops / share + evaluated * flops / 3 / share
        folder = Path(f"weights/{name}/{config['run']}", *([] if character else [plan.corpus]))
        work = f"{parameters:,} parameters, {seen / 1e6:,.1f} million {'characters' if character else 'tokens'}"
        rows.append((f"training of {experiment.model.kind}", work, seconds, folder / "record.json"))
    # GPT-2 was the last of the loop.
    dtypes, part, results = config["gpt2"]["dtypes"], config["gpt2"], Path("results/records")
    runs, length, forward = part["throughput_runs"], part["throughput_tokens"], flops / 3
    seconds = sum(START + 0.1 * tokens * forward / SHARE["forward"] / rates[dtype] for dtype in dtypes)
    measured = [("loss of GPT-2", ", ".join(dtypes), seconds, results / f"evaluate_gpt2_{dtypes[-1]}.json")]
    if plan.hellaswag:
        seconds = START + HELLASWAG_TOKENS * forward / SHARE["forward"] / rates["float32"]
        measured.append(("HellaSwag", "10,042 items, float32", seconds, results / "hellaswag_gpt2.json"))
    bytes_read = {"float32": 4 * parameters, "bfloat16": 2 * parameters, "int8": parameters}
    read = sum(bytes_read[dtype] for dtype in dtypes) * runs * length
    seconds = len(dtypes) * START + read / bandwidth / SHARE["sampling"]
    work = f"{runs} runs of {length} tokens, {', '.join(dtypes)}"
    measured.append(("sampling speed of GPT-2", work, seconds, results / f"sampling_gpt2_{dtypes[-1]}.json"))
    rows += measured
    if plan.streams:
        made = sum(plan.streams) * runs * length
        seconds = len(plan.streams) * START + made * forward / SHARE["streams"] / rates[fast]
        work = f"{runs} runs of {length} tokens, {', '.join(map(str, plan.streams))} streams"
        rows.append(
            ("sampling many streams", work, seconds, results / f"sampling_gpt2_{plan.streams[-1]}_streams.json")
        )
    if "pretrained" in plan.from_hub:
        last = results / f"sampling_gpt2-pretrained_{dtypes[-1]}.json"
        seconds = sum(about for *_, about, _ in measured)
        rows.append(("OpenAI's GPT-2", "loss and speed as of ours, if the hub gives it", seconds, last))
    for name, machine in plan.machines.items():
        if f"ladder/{name}/{next(iter(machine.ladder))}" not in plan.measured_rungs:
            continue
        settings = machines.load(machine.argument)
        steps = settings.warmup_steps + settings.steps + 1
        cost = steps * settings.batch_size * settings.block_size * flops / SHARE["train"]
        slow = ("baseline", "tf32")
        seconds = sum(START + cost / rates["float32" if rung in slow else fast] for rung in machine.ladder)
        seconds += COMPILATION * len(list(itertools.dropwhile(lambda rung: rung != "compile", machine.ladder)))
        last = results / f"ladder/{name}/{list(machine.ladder)[-1]}.json"
        rows.append((f"training ladder of {settings.title}", f"{len(machine.ladder)} rungs", seconds, last))
    left = sum(about for *_, about, record in rows if not record.exists())
    shown = [(part, work, "done" if record.exists() else _clock(about)) for part, work, about, record in rows]
    return [*shown, ("all of it", f"on {hardware.select().name}, if nothing else runs here", _clock(left))]


def _tokens(experiment: Experiment, train: float, val: float) -> tuple[float, float]:
    """Tokens that a training learns from, and those of its evaluations."""
    config = experiment.train
    steps = config.steps or (config.epochs or 1) * train / config.batch_size / experiment.model.block_size
    extra = {"none": 0.0, "part": 2 * val, "whole": 2 * train}[config.eval_train]
    return steps * config.batch_size * experiment.model.block_size, (steps // config.eval_interval + 2) * val + extra


def _size(experiment: Experiment) -> tuple[int, int]:
    """Parameters, and FLOP of a training step per token."""
    vocab_size = 50257 if MODELS[experiment.model.kind].tokenizer == "gpt2" else 65
    with shapes_only():
        model = models.build(experiment.model, vocab_size, 0)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return model.parameter_count(), model.flops_per_token() or 6 * products


def _products_per_second(dtype: str) -> float:
    """FLOP/s of products of matrices like GPT-2's, measured for a third of a second."""
    device = hardware.select()
    a, b = (
        torch.ones(shape, dtype=getattr(torch, dtype), device=device.torch_name) for shape in ((512, 768), (768, 3072))
    )
    return 2 * 512 * 768 * 3072 * _per_second(lambda: a @ b, device)


def _copied_bytes_per_second() -> float:
    device = hardware.select()
    a = torch.ones(1 << 25, device=device.torch_name)
    return a.nbytes * _per_second(lambda: a.sum(), device)


def _per_second(action: Any, device: hardware.Device) -> float:
    action()
    hardware.synchronize(device)
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 0.33 or not count:
        action()
        hardware.synchronize(device)
        count += 1
    return count / seconds


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds, -1 if seconds > 60 else 0)))
