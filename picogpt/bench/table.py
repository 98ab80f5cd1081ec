"""One table of what a device reaches, with nanoGPT and transformers measured beside it in the same run, in turn."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from picogpt import hardware, machines, models, records
from picogpt.bench import ladder, measure
from picogpt.config import Experiment, GPT2Config
from picogpt.data.tokenizers import Tokenizer
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError
from picogpt.models.pretrained import VOCAB_SIZE
from picogpt.registry import RUNGS
from picogpt.train.distributed import World
from picogpt.train.step import GRAPH_MODES, Step, Switches

ROUNDS = 3
"""Ours and the peer take this many turns."""


class Row(NamedTuple):
    """One measurement: the median of its rounds, beside a peer's where it was at hand."""

    what: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None


def training(experiment: Experiment, nanogpt: Path | None, batch_size: int, steps: int) -> Row:
    """Tokens/s of training steps of GPT-2 with the best switches, on random tokens; nanoGPT's `model.py` beside it.

    Raises PicogptError when the file is not nanoGPT's model.
    """
    config, device = experiment.model, hardware.select()
    assert isinstance(config, GPT2Config)
    shape = batch_size, config.block_size
    x, y = (torch.randint(VOCAB_SIZE, shape, device=device.torch_name) for _ in range(2))
    compile_mode = "default" if device.type == "cuda" else None
    switches = Switches(compile=compile_mode, residual="bfloat16" if device.type == "cuda" else "float32")
    train = experiment.train.model_copy(update={"optimizer": "adamw", "batch_size": batch_size})
    step = Step(models.build(config, VOCAB_SIZE, 1), train, 1, device, World(), batch_size, switches)
    actions: list[Callable[[], Any]] = [lambda: step(x, y, 0)]
    if nanogpt:
        actions.append(_nanogpt_step(nanogpt, config, x, y, device))
    rates = [batch_size * config.block_size / seconds for seconds in _in_turn(actions, steps, device)]
    what = f"training GPT-2, B={batch_size}, T={config.block_size}"
    return Row(what, rates[0], "tokens/s", *(("nanoGPT", rates[1]) if nanogpt else ()))


def _nanogpt_step(path: Path, config: GPT2Config, x: torch.Tensor, y: torch.Tensor, device: hardware.Device) -> Any:
    """A training step as nanoGPT's train.py makes it: compiled, autocast, clipping, fused AdamW."""
    try:
        specification: Any = importlib.util.spec_from_file_location("nanogpt_model", path)
        module = importlib.util.module_from_spec(specification)
        sys.modules["nanogpt_model"] = module
        specification.loader.exec_module(module)
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        settings = module.GPTConfig(**shape, block_size=config.block_size, vocab_size=50304, dropout=0.0, bias=True)
        model = module.GPT(settings).to(device.torch_name)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    except (OSError, AttributeError, TypeError, SyntaxError, ImportError) as error:
        raise PicogptError(f"{path} is not nanoGPT's model.py: {error}") from error
    forward = torch.compile(model)
    autocast = torch.autocast(device.type, getattr(torch, device.dtype), enabled=device.dtype != "float32")

    def step() -> None:
        with autocast:
            loss = forward(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _in_turn(actions: list[Callable[[], Any]], repeats: int, device: hardware.Device) -> list[float]:
    """Median seconds of each action, over `ROUNDS` rounds of `repeats` in turn, after two calls to warm up."""
    taken: list[list[float]] = [[] for _ in actions]
    for number in range(ROUNDS + 1):
        for action, seconds in zip(actions, taken, strict=True):
            for _ in range(repeats if number else 2):
                hardware.synchronize(device)
                began = time.perf_counter()
                action()
                hardware.synchronize(device)
                if number:
                    seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in taken]


def ladder_top(experiment: Experiment, data: TokenData) -> Iterator[Row]:
    """Tokens/s of the last rung of this machine's training ladder that captures no CUDA graphs; none where it is not measured."""
    for name in machines.fitting()[:1]:
        machine = machines.load(name)
        rung = [rung for rung in machine.rungs if RUNGS[rung].changes.get("compile") not in GRAPH_MODES][-1]
        assert isinstance(experiment.model, GPT2Config)
        record = ladder.measure(name, machine, rung, experiment.model, data, World())
        if record["results"]:
            yield Row(f"ladder of {name}, {rung}", record["results"]["tokens_per_second"], "tokens/s")


def sampling(experiment: Experiment, tokenizer: Tokenizer, tokens: int) -> Iterator[Row]:
    """Tokens/s of sampling from a GPT-2 with random weights, one stream and many; transformers beside one of them."""
    on_gpu = hardware.select().type == "cuda"
    fast = hardware.select().dtype
    variants = [("float32", 1, False), (fast, 1, False), (fast, 64 if on_gpu else 16, False)]
    variants += [(fast, 1, True)] if on_gpu else []
    for dtype, streams, compiled in dict.fromkeys(variants):
        model = models.build(experiment.model, VOCAB_SIZE, 1)
        asked: dict[str, Any] = {"device": "auto", "dtype": dtype, "num_tokens": tokens, "runs": ROUNDS}
        record = measure.speed(
            records.Key("sampling", "gpt2", dtype=dtype), model, tokenizer, "random weights",
            batch_size=streams, prompt="\n", compiled=compiled, **asked,
        )  # fmt: skip
        what = f"sampling, {dtype}, {streams} stream{'s' * (streams > 1)}{', --compile' * compiled}"
        beside = (dtype, streams, compiled) == (fast, 1, False)
        peer = ("transformers", theirs) if beside and (theirs := _transformers(experiment, fast, tokens)) else ()
        yield Row(what, record["results"]["median"], "tokens/s", *peer)


def _transformers(experiment: Experiment, dtype: str, tokens: int) -> float | None:
    """Tokens/s of transformers' GPT-2 of the same shape; None where transformers is not installed."""
    if not importlib.util.find_spec("transformers"):
        return None
    import transformers

    c: Any = experiment.model
    shape = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size}
    device = hardware.select().torch_name
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([[198]], device=device)
    asked = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": True, "top_k": 0, "pad_token_id": 50256}
    rates = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        hardware.synchronize(hardware.select())
        rates.append(tokens / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def whole_trainings(overrides: Sequence[str]) -> Iterator[Row]:
    """Seconds of whole trainings by the command line, from start to end, and the losses that they reach.

    Raises PicogptError when one of them fails.
    """
    for kind in ("gpt2", "char-transformer"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"--folder={folder}/run", *(f"--set={override}" for override in overrides)]
            began = time.perf_counter()
            run = subprocess.run(
                [sys.executable, "-m", "picogpt", "train", kind, *arguments], capture_output=True, text=True
            )
            if run.returncode:
                raise PicogptError(f"the training of {kind} failed: {run.stderr.strip()}")
            yield Row(f"training of {kind}, whole command", time.perf_counter() - began, "s")
            loss = records.read(Path(folder) / "run/record.json")["results"]["best_val_loss"]
            yield Row(f"training of {kind}, best validation loss", loss, "nats")
