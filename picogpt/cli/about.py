"""Commands about this machine and the settings."""

from __future__ import annotations

import json
from pathlib import Path

import click

from picogpt.errors import PicogptError


@click.command()
@click.argument("files", nargs=-1)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print what a workflow asks: size (cpu or gpu), gpus, fits, and all machines, those of FILES too.",
)
@click.option(
    "--draft", "only_draft", is_flag=True, help="Print a file for this machine, for config/hardware/NAME.yaml."
)
def hardware(files: tuple[str, ...], as_json: bool, only_draft: bool) -> None:
    """Show what is here: device, the dtype that is fast on it, cores, memory; and which hardware files fit it.

    Where none fits, it prints a draft of one, filled in as far as it can be told. FILES, of your own, are checked.

    \b
      picogpt hardware
      picogpt hardware --draft > config/hardware/mine.yaml
      picogpt hardware mine.yaml
    """
    from picogpt import hardware as machine
    from picogpt import machines

    if only_draft:  # before the files are read: the shell has made an empty one of what this is to fill
        click.echo(machines.draft(), nl=False)
        return
    known = {machines.name_of(name): machines.load(name) for name in (*machines.names(), *files)}
    if as_json:
        here = {
            "size": machine.size_of_machine(),
            # Of a CPU that is known without torch, which takes seconds to load.
            "dtype": machine.select("cpu" if machines.here()[0] == "cpu" else "auto").dtype,
            "gpus": len(machine.nvidia_gpus()),
            "fits": machines.fitting(),
            "machines": {name: settings.model_dump(mode="json") for name, settings in known.items()},
        }
        click.echo(json.dumps(here))
        return
    device = machine.select()
    click.echo(f"device   {device.name} ({device.torch_name})")
    click.echo(f"dtype    {device.dtype} for matrix products")
    click.echo(f"cores    {machine.cpu_count()}")
    click.echo(f"memory   {machine.memory_bytes() / 2**30:.1f} GiB")
    gpus = machine.nvidia_gpus()
    if gpus:
        click.echo(f"GPUs     {len(gpus)}: {', '.join(sorted(set(gpus)))}")
    for name in map(machines.name_of, files):
        click.echo(f"file     {name} is right: {known[name].title}, {len(known[name].rungs)} rungs")
    fitting = machines.fitting()
    if fitting:
        click.echo(f"fits     {', '.join(fitting)} (config/hardware/)")
    else:
        click.echo(
            f"fits     none of {', '.join(machines.names())} (config/hardware/); a draft:\n\n{machines.draft()}",
            nl=False,
        )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail where a file differs from the types.")
def schema(folder: Path, check: bool) -> None:
    """Write the JSON schemas of the settings into FOLDER."""
    from picogpt.config import SCHEMAS, json_schema
    from picogpt.files import read_text, write_text

    for name in SCHEMAS:
        path = folder / f"{name}.schema.json"
        if not check:
            write_text(path, json_schema(name))
        elif read_text(path) != json_schema(name):
            raise PicogptError(f"{path} is out of step with picogpt/config.py: picogpt schema {folder} writes it anew")
