"""What a workflow must know before it can list its jobs: the text, settings of models, resources of machines.

Everything is read from files and from this machine, without the network.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from picogpt import hardware, machines
from picogpt.config import Settings, load_experiment, model_file, parse, read_yaml
from picogpt.data import documents, fetch
from picogpt.errors import UsageError
from picogpt.files import own_name

RESOURCES = Path("resources")
CLOCK_TOLERANCE_S = 60
"""By so much clocks of a network may differ. Snakemake fails where an output is older than its input."""

Name = Annotated[str, Field(min_length=1)]


class ModelPart(Settings, extra="ignore"):
    config: Name = "auto"
    set: list[str] = Field([])


class GPT2Part(ModelPart):
    pretrained: bool = True
    throughput_streams: Literal["auto"] | list[int] = "auto"
    hellaswag: Literal["auto"] | bool = "auto"


class LadderPart(Settings, extra="ignore"):
    hardware: Literal["auto"] | list[Name] = "auto"


class Configuration(Settings, extra="ignore"):
    """The keys of `config/config.yaml` that affect the plan; `config/config.schema.yaml` documents all."""

    corpus: Annotated[list[Name], Field(min_length=1)] | Name
    run: str = Field("pipeline", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @field_validator("run", "corpus", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | list):
            return value
        raise ValueError(
            f"YAML reads this as {value!r}, which is no text: put it in quotes in a file for --configfile, or use letters"
        )

    gpus: Literal["auto"] | Annotated[int, Field(ge=0, strict=True)] = "auto"
    gpu_model: str | dict[str, str] = ""
    char_bigram: ModelPart = ModelPart()
    char_transformer: ModelPart = ModelPart()
    gpt2: GPT2Part = GPT2Part()
    ladder: LadderPart = LadderPart()


class Job(Settings):
    """How the processes of a job are started: one rank for each device."""

    launch: str = Field(description="the start of its shell command")
    ranks: int = Field(description="processes on one node")
    resources: dict[str, Any] = Field(description="what it requests from a cluster; null: not requested")


class TrainingPlan(Settings):
    """What decides the weights of a training."""

    file: list[str] = Field(description="options of picogpt train that name the settings file")
    settings: str = Field(description="settings that determine the weights, as JSON: the file without its `runtime`")


class RungPlan(Settings):
    """One rung of a training ladder."""

    before: list[str] = Field(description="the rung before it, if there is one")
    settings: str = Field(description="what determines its record: the machine's file with the rungs up to it, as JSON")


class MachinePlan(Job):
    """A machine of `config/hardware/`, or a file of the user's own, and the jobs on all of its ranks."""

    argument: str = Field(description="its name or path on the command line")
    settings: str = Field(description="its file, as JSON")
    ladder: dict[str, RungPlan]
    training: TrainingPlan | None = Field(description="the long training on FineWeb-Edu that its file names")


class Plan(Settings):
    """The answer of `picogpt plan`."""

    text: str = Field(description="path of the text that everything is trained on")
    corpus: str = Field(description="name of that text in file names; if another replaces it, the files say so")
    text_identity: dict[str, str] = Field(description="hash of a text of the user's own, by which a change is noticed")
    detected: list[str] = Field(description="keys with the value `auto`, resolved by looking at this machine")
    fast_dtype: str = Field(description="dtype of the benchmarks of many streams")
    streams: list[int] = Field(description="how many streams are sampled at once in each of them")
    hellaswag: bool = Field(description="whether HellaSwag is measured")
    resources: dict[str, Any] = Field(description="resources of a job on a single device")
    models: dict[str, TrainingPlan]
    gpt2: Job = Field(description="the training of GPT-2, on all devices")
    ladder_model: str = Field(description="settings of the model whose training step is measured, as JSON")
    machines: dict[str, MachinePlan]
    measured_rungs: list[str] = Field(description="rungs of ladders that are measured here: ladder/MACHINE/RUNG")
    long_trainings: list[str] = Field(description="machines that are measured here and have a long training")
    from_hub: list[str] = Field(description="files without which the rest is made too: those of the hub, and HellaSwag")
    hub_attempt: int = Field(description="number of the last attempt to ask the hub, plus one if it is asked again")


def make(tree: dict[str, Any], source: str) -> Plan:
    """The plan for a configuration; `source` names it in errors.

    Raises UsageError where the configuration asks for something that is not there or that cannot work.
    """
    asked = parse(Configuration, tree, source)
    text, corpus, sha256 = _text(asked.corpus)
    here = len(hardware.usable_gpus())
    gpus = here if asked.gpus == "auto" else asked.gpus
    models = {}
    for name in ("char_bigram", "char_transformer", "gpt2"):
        part: ModelPart = getattr(asked, name)
        file = model_file(name if part.config == "auto" else part.config)
        batch_size = load_experiment(file, part.set).train.batch_size
        models[name] = TrainingPlan(
            file=[] if part.config == "auto" else [f"--config={part.config}"], settings=_deciding(file)
        )
    gpt2 = _job(asked, "default", gpus > 0, _ranks(asked, gpus, batch_size))  # gpt2 was the last of the loop
    arguments = machines.fitting() if asked.ladder.hardware == "auto" else asked.ladder.hardware
    measured = {machines.name_of(argument): argument for argument in arguments}
    if odd := [name for name in measured if not re.fullmatch("[A-Za-z0-9_-]+", name)]:
        raise UsageError(
            f"ladder.hardware: the name of the file {odd[0]!r} may have letters a to z, digits, - and _ alone"
        )
    known = {name: _machine(asked, name, measured.get(name, name)) for name in sorted({*machines.names(), *measured})}
    long_trainings = [name for name in measured if known[name].training]
    fineweb = Path("weights/gpt2_tokenizer") / asked.run / "fineweb-edu/manifest.json"
    hellaswag = gpus > 0 if asked.gpt2.hellaswag == "auto" else asked.gpt2.hellaswag
    wanted = {"pretrained": asked.gpt2.pretrained, "fineweb-edu/0": bool(long_trainings) and not fineweb.exists()}
    wanted["hellaswag"] = hellaswag
    from_hub = [name for name, needed in wanted.items() if needed]
    resolvable = {"gpus": asked.gpus, "ladder: hardware": asked.ladder.hardware}
    return Plan(
        text=text,
        corpus=corpus,
        text_identity={"text_sha256": sha256} if sha256 else {},
        detected=[key for key, value in resolvable.items() if value == "auto"],
        fast_dtype=_fast_dtype(gpus, here),
        streams=_streams(asked, gpus),
        hellaswag=hellaswag,
        resources=_job(asked, "default", gpus > 0).resources,
        models=models,
        gpt2=gpt2,
        ladder_model=json.dumps(read_yaml(model_file("gpt2"))["model"], sort_keys=True),
        machines=known,
        measured_rungs=[f"ladder/{name}/{rung}" for name in measured for rung in known[name].ladder],
        long_trainings=long_trainings,
        from_hub=from_hub,
        hub_attempt=_hub_attempt(from_hub),
    )


def launch(ranks: int, nodes: int = 1) -> str:
    """The start of a shell command that trains: one process per device, on one node or on those of a SLURM job.

    Jobs that share a node get ports of their own from their job numbers, below the range that Linux assigns by itself.
    """
    # torchrun replaces a lost rank once, from the last checkpoint, and gives ranks that must stop time to save.
    torchrun = f"torchrun --nproc_per_node={ranks} --max-restarts=1 --shutdown-timeout=100"
    if nodes == 1:
        return f"{torchrun} --standalone -m picogpt" if ranks > 1 else "picogpt"
    return (
        "srun --jobid=${SLURM_JOB_ID:?several nodes need snakemake --workflow-profile slurm}"
        f" --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1"
        # A store for each attempt: after a restart the nodes need not agree on the number of attempts.
        " env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        f" {torchrun} --nnodes={nodes} --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID"
        " --rdzv-endpoint=$(hostname):$((10000 + SLURM_JOB_ID % 20000)) -m picogpt"
    )


def _text(corpus: list[str] | str) -> tuple[str, str, str | None]:
    """(path, name, hash) of the user's own text, or (path, name, None) of a registered one, which a fetch rule copies."""
    if isinstance(corpus, list) or (corpus in fetch.registry() and not Path(corpus).is_file()):
        return str(RESOURCES / "corpus.txt"), corpus[0] if isinstance(corpus, list) else corpus, None
    path = Path(corpus)
    if {"{", "}"} & set(corpus):
        raise UsageError(f"corpus: {corpus}: Snakemake takes braces in a path for a wildcard: rename the file")
    if not (path.is_file() or path.is_dir()):
        # Otherwise the tokens of another text, where an earlier run has left some, would be used without a word.
        names = ", ".join(name for name, asset in fetch.registry().items() if asset.kind == "corpus")
        raise UsageError(f"there is no text {corpus}: `corpus` is a file or a folder of texts, or one of {names}")
    sha256 = documents.sha256(path)
    if path.stem in fetch.registry() and not fetch.identify(sha256):
        mistake = f"is not the registered {path.stem}, whose name it bears"
        raise UsageError(f"corpus: {corpus} {mistake}: rename it, to my.txt, and run snakemake --config corpus=my.txt")
    if path.stat().st_mtime > time.time() + CLOCK_TOLERANCE_S:
        raise UsageError(f"corpus: {corpus} has a modification time in the future: correct it with touch {corpus}")
    # Texts of the same file name in different folders, or with different suffixes, have names of their own.
    alone = path.parent == Path() and path.suffix in (".txt", "")
    return str(path), own_name(path.stem, None if alone else str(path)), sha256


def _deciding(file: str | Path) -> str:
    """The settings of a file that decide the weights, as JSON."""
    return json.dumps({key: value for key, value in read_yaml(file).items() if key != "runtime"}, sort_keys=True)


def _ranks(asked: Configuration, gpus: int, batch_size: int) -> int:
    """The largest number of available GPUs that divides the batch of GPT-2's training, or the configured number."""
    fitting = [ranks for ranks in range(1, min(gpus, batch_size) + 1) if batch_size % ranks == 0]
    if asked.gpus != "auto" and gpus and gpus not in fitting:
        must = f"must divide train.batch_size of gpt2, which is {batch_size}"
        raise UsageError(f"gpus: {gpus} {must}: use {', '.join(map(str, fitting))}, or change train.batch_size")
    return max(fitting, default=1)


def _fast_dtype(gpus: int, here: int) -> str:
    if (gpus > 0) != (here > 0):  # the job runs on another machine
        return "bfloat16" if gpus else "float32"
    # A CPU is described without torch, which takes seconds to load.
    return hardware.select("auto" if here else "cpu").dtype


def _streams(asked: Configuration, gpus: int) -> list[int]:
    wanted = asked.gpt2.throughput_streams  # on a CPU 16 take minutes already
    return ([16, 64, 256] if gpus else [16]) if wanted == "auto" else wanted


def _job(asked: Configuration, machine: str, on_gpu: bool, ranks: int = 1, nodes: int = 1) -> Job:
    """Each node runs one task, which starts its ranks; on several nodes srun starts the tasks."""
    gpu_model = asked.gpu_model.get(machine) if isinstance(asked.gpu_model, dict) else asked.gpu_model
    resources = {
        "nodes": nodes,
        "gpu": nodes * ranks if on_gpu else 0,
        "gpu_model": (gpu_model or None) if on_gpu else None,
        "tasks": nodes if nodes > 1 else None,
        "tasks_per_gpu": 0,  # otherwise the plugin for SLURM would start a task for each GPU
        "mpi": "srun" if nodes > 1 else None,
        "cpus_per_task": 8 * ranks,
    }
    return Job(launch=launch(ranks, nodes), ranks=ranks, resources=resources)


def _machine(asked: Configuration, name: str, argument: str) -> MachinePlan:
    machine = machines.load(argument)
    tree = machine.model_dump(mode="json")
    deciding = {key: value for key, value in tree.items() if key not in ("title", "training")}
    training = None
    if machine.training:
        batch = json.dumps({key: tree[key] for key in ("device", "batch_size", "block_size")})
        settings = f"{_deciding(model_file(machine.training))} {batch}"
        training = TrainingPlan(file=[f"--config={machine.training}"], settings=settings)
    return MachinePlan(
        **dict(_job(asked, name, machine.kind == "cuda", machine.ranks, machine.nodes)),
        argument=argument,
        settings=json.dumps(tree, sort_keys=True),
        ladder={
            rung: RungPlan(
                before=machine.rungs[max(0, index - 1) : index],
                settings=json.dumps({**deciding, "rungs": machine.rungs[: index + 1]}, sort_keys=True),
            )
            for index, rung in enumerate(machine.rungs)
        },
        training=training,
    )


def _hub_attempt(names: list[str]) -> int:
    """The number of the last attempt, plus one unless each file is here or was refused by this hub."""
    status = fetch.read_status(RESOURCES / "hub.json")
    if status is None:
        return 1
    answers = [status.files.get(name, fetch.Answer(state="unreachable")) for name in names]
    here = [answer.state == "here" and Path(str(answer.path)).exists() for answer in answers]
    refused = [answer.state == "refused" and status.endpoint == fetch.endpoint() for answer in answers]
    settled = [known or final for known, final in zip(here, refused, strict=True)]
    return status.attempt + (not all(settled))
