"""Commands about this machine, and about what can be planned on it."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("files", nargs=-1)
@click.option("--draft", is_flag=True, help="Print a draft of config/hardware/NAME.yaml for this machine.")
def hardware(files: tuple[str, ...], draft: bool) -> None:
    """Show this machine, and which files of config/hardware/ fit it, or a draft of one. FILES of your own are checked.

    \b
      picogpt hardware
      picogpt hardware --draft > mine.yaml
      picogpt hardware mine.yaml
    """
    from picogpt import hardware as machine
    from picogpt import machines

    if draft:  # before the files are read: the shell has made an empty one of what this is to fill
        click.echo(machines.draft(), nl=False)
        return
    known = {machines.name_of(name): machines.load(name) for name in files}
    device, gpus, fitting = machine.select(), machine.nvidia_gpus(), machines.fitting()
    click.echo(f"device   {device.name} ({device.torch_name})")
    click.echo(f"dtype    {device.dtype} for matrix products")
    click.echo(f"cores    {machine.cpu_count()}")
    click.echo(f"memory   {machine.memory_bytes() / 2**30:.1f} GiB")
    if gpus:
        click.echo(f"GPUs     {len(gpus)}: {', '.join(sorted(set(gpus)))}")
    for name, settings in known.items():
        click.echo(f"file     {name} is valid: {settings.title}, {len(settings.rungs)} rungs")
    if fitting:
        click.echo(f"fits     {', '.join(fitting)} (config/hardware/)")
    else:
        click.echo(f"fits     none of {', '.join(machines.names())} (config/hardware/); a draft:\n\n{machines.draft()}")


@click.command()
@click.argument("configuration", default="config/config.yaml")
@click.option(
    "--estimate", is_flag=True, help="Print instead about how long each part takes here, from a measured second."
)
def plan(configuration: str, estimate: bool) -> None:
    """Print, as JSON, what a workflow must know before it can list its jobs. Uses no network.

    The plan names the text, the settings of each model, the machines of config/hardware/ that are measured here, and the
    resources that a job on each of them needs. CONFIGURATION is a file like config/config.yaml, or - for standard input.
    """
    from picogpt import plan as planning
    from picogpt.config import read_yaml

    stream = sys.stdin if configuration == "-" else None
    source = "the configuration" if stream else configuration
    tree = read_yaml(source, stream)
    made = planning.make(tree, source)
    if not estimate:
        return click.echo(made.model_dump_json(indent=2))
    from picogpt.cli.common import aligned
    from picogpt.estimate import table

    click.echo(aligned([("part", "work", "about"), *table(tree, made)], range(2, 3)))
