"""The command that trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from picogpt.cli import common
from picogpt.cli.common import KINDS, PATH, WEIGHTS
from picogpt.errors import Interrupted, UsageError
from picogpt.files import own_name, read_text, write_text
from picogpt.ranks import launcher
from picogpt.registry import MODELS, settings_class

if TYPE_CHECKING:
    from picogpt.config import MachineConfig

SHORT = {"seed": "train.seed", "steps": "train.steps", "init": "train.init", "device": "runtime.device"}
"""Settings with an option of their own."""


class TrainCommand(click.Command):
    """Lists every setting at the end of its help, from the types that check them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from picogpt.config import RuntimeConfig, TrainConfig, describe

        formatter.write_paragraph()
        formatter.write_text("Settings for --set, with their defaults (the files in config/models/ set others):")
        sections = {f"model of {name}": ("model", settings_class(name)) for name in MODELS}
        sections["train: everything that changes the result"] = ("train", TrainConfig)
        sections["runtime: device, speed and logging"] = ("runtime", RuntimeConfig)
        for title, (prefix, cls) in sections.items():
            settings = [row for row in describe(cls, f"{prefix}.") if row[0] != "model.kind"]
            rows = [(key if default in ("", "null") else f"{key}={default}", text) for key, default, text in settings]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=44)


@click.command(cls=TrainCommand)
@click.argument("kind", type=click.Choice(KINDS))
@common.data_option
@click.option(
    "--name",
    "--run",
    "run",
    callback=common.run_name,
    help=f"{common.RUN_PATTERN} An interrupted run continues under its name.",
)
@click.option("--folder", type=PATH, help="Folder of the run, in place of weights/KIND/RUN/.")
@click.option("--config", help="YAML file of settings, or a name in config/models/. [default: of the model]")
@common.set_option
@click.option("--seed", type=int, help="Short for --set train.seed=N.")
@click.option("--steps", type=int, help="Short for --set train.steps=N.")
@click.option("--init", type=click.Choice(["scratch", "pretrained"]), help="Short for --set train.init=.")
@click.option("--device", help="Short for --set runtime.device=: auto, cpu, cuda, cuda:N or mps.")
@click.option("--hardware", help="Machine of config/hardware/: use its batch, and refuse to run on any other device.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make a few steps and print what the training needs: time, memory, disk. Saves nothing.",
)
@click.option("--replace", is_flag=True, help="Start over if the folder holds a run with other settings or data.")
def train(
    kind: str, data: Path | None, run: str | None, folder: Path | None, hardware: str | None, **options: Any
) -> None:
    """Train a model. Results go to weights/KIND/RUN/: best.pt, metrics.jsonl, record.json (gpt2: RUN/CORPUS/).

    Ctrl-C (SIGTERM, SIGUSR1, SIGHUP) saves a checkpoint at the next step and stops; the same command with --name continues from
    there and ends with bit-identical weights. Under torchrun every rank computes its share of each batch; a run can be
    continued with a different number of ranks.

    \b
      picogpt train char-bigram
      picogpt train char-transformer --name mine --set model.n_layer=6 --set train.epochs=4
      picogpt train gpt2 --init pretrained --steps 100
      picogpt train gpt2 --dry-run --set train.batch_size=64
      torchrun --standalone --nproc_per_node=2 -m picogpt train gpt2
    """
    if run and folder:
        raise UsageError("give --name or --folder, not both")
    from picogpt import machines
    from picogpt.config import load_experiment, model_file
    from picogpt.data.corpus import open_data
    from picogpt.train.distributed import init_distributed

    overrides = [*options["overrides"]]
    overrides += [f"{key}={options[name]}" for name, key in SHORT.items() if options[name] is not None]
    machine = machines.load(hardware) if hardware else None
    if machine:
        overrides += _batch(machine, overrides)
    experiment = load_experiment(model_file(kind if options["config"] is None else options["config"]), overrides)
    if experiment.model.kind != kind:
        raise UsageError(f"{options['config']} describes a {experiment.model.kind}, not a {kind}")
    token_data = open_data(data or common.token_folder(kind))
    common.require_fitting(kind, token_data)

    if options["dry_run"]:
        from picogpt.train import dry_run

        run = run or (None if folder else common.now())  # the folder of a name that is given is not made yet
    from picogpt.train.loop import Trainer

    with init_distributed(experiment.runtime.device) as world, ExitStack() as held:
        corpus = token_data.train.header.corpus
        target = folder or world.broadcast_from_main(lambda: _folder(held, kind, run, corpus))
        make: type[Trainer] = Trainer
        if options["dry_run"]:
            held.enter_context(dry_run.nothing_left_behind())
            make = dry_run.DryRun
        trainer = make(experiment, token_data, target, world, machines.name_of(hardware) if hardware else None)
        if hardware and machine:
            machines.require(hardware, machine, trainer.device, world.size)
        if options["dry_run"] and isinstance(trainer, dry_run.DryRun):
            rows = trainer.measure(options["replace"])
            return click.echo(common.aligned(rows, range(1, 2))) if world.is_main else None
        try:
            record = trainer.run(options["replace"])
        except Interrupted as stop:
            again = "" if run or folder else f" with --name {target.relative_to(WEIGHTS).parts[1]}"
            raise Interrupted(stop.exit_status - 128, f"{stop}: the same command{again} continues from there") from None
    if not world.is_main:
        return
    if not trainer.progress.sessions:
        click.echo(f"{target} is finished already; nothing was trained", err=True)
    if note := _note(kind):
        note.unlink(missing_ok=True)
    results = record["results"]
    click.echo(
        f"{target}/best.pt: validation loss {results['best_val_loss']:.6f} at epoch {results['best_epoch']:.2f}"
        f" (step {results['best_step']} of {results['steps']}), {results['train_seconds']:.0f} s of training"
    )


def _batch(machine: MachineConfig, overrides: Sequence[str]) -> list[str]:
    """The settings that a machine of config/hardware/ brings. Raises UsageError where `overrides` has one of them."""
    batch = {
        "train.batch_size": machine.batch_size,
        "train.micro_batch_size": machine.micro_batch_size,
        "model.block_size": machine.block_size,
    }
    if twice := [override for override in overrides if override.partition("=")[0] in batch]:
        raise UsageError(f"--set {twice[0]}: the file of --hardware sets that; use one of them")
    return [f"{key}={value}" for key, value in batch.items()]


def _folder(held: ExitStack, kind: str, run: str | None, corpus: str) -> Path:
    """weights/KIND/RUN, for gpt2 with a folder for the corpus; after a restart by torchrun, that of the run that broke."""
    note = None if run else _note(kind)
    if note and note.exists():  # torchrun has started the ranks again: they must find what they began
        run = read_text(note)
    folder = held.enter_context(common.run_folder(WEIGHTS / kind.replace("-", "_"), run))
    if note:
        write_text(note, folder.name)
    return folder / own_name(corpus) if kind == "gpt2" else folder


def _note(kind: str) -> Path | None:
    """Where the ranks of one torchrun note the name of their run; None without torchrun."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    job = launcher() if job == "none" else job
    return WEIGHTS / kind.replace("-", "_") / f".{job}" if job else None
