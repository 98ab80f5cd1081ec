"""Commands about this machine and the settings."""

from __future__ import annotations

from pathlib import Path

import click

from picogpt.errors import PicogptError


@click.command()
@click.option("--size", "only_size", is_flag=True, help="Print just cpu or gpu: which settings fit this machine.")
@click.option("--gpus", "only_gpus", is_flag=True, help="Print just the number of NVIDIA GPUs.")
def hardware(only_size: bool, only_gpus: bool) -> None:
    """Show what is here: device, the dtype that is fast on it, cores, memory."""
    from picogpt import hardware as machine

    if only_size:
        click.echo(machine.size_of_machine())
        return
    if only_gpus:
        click.echo(len(machine.nvidia_gpus()))
        return
    device = machine.select()
    click.echo(f"device   {device.name} ({device.torch_name})")
    click.echo(f"dtype    {device.dtype} for matrix products")
    click.echo(f"cores    {machine.cpu_count()}")
    click.echo(f"memory   {machine.memory_bytes() / 2**30:.1f} GiB")


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
