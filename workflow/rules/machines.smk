# The machines of the write-up: which there are, which are measured here. Nothing here runs a step.

SHIPPED = Path(workflow.basedir, "../config/hardware")
REFERENCE = Path(workflow.basedir, "../results/reference")


# What the ladder is measured on: the machines that were asked for, or those that this one fits. By name: what the
# command line calls it. A file of one's own is called by its path.
ASKED = HERE["fits"] if config["ladder"]["hardware"] == "auto" else config["ladder"]["hardware"]
MEASURED = {Path(argument).stem: argument for argument in ASKED}
HARDWARE = sorted({path.stem for path in SHIPPED.glob("*.yaml")} | MEASURED.keys())


def machine_argument(name):
    """What the command line calls a machine."""
    return MEASURED.get(name, name)


def machine_settings(name):
    """A machine's file."""
    argument = machine_argument(name)
    path = Path(argument) if Path(argument).suffix else SHIPPED / f"{name}.yaml"
    if not path.exists():
        raise WorkflowError(f"there is no hardware {name}: {', '.join(HARDWARE)} are in config/hardware/")
    return yaml.safe_load(path.read_text())


def machine_launch(name):
    """How a command that trains is started on a machine."""
    machine = machine_settings(name)
    return launch(machine.get("ranks", 1), machine.get("nodes", 1))


def allocation(name, resource):
    """What a job on a machine asks for; None: it does not. One task a node starts the ranks there, by srun on several."""
    machine = machine_settings(name)
    nodes, ranks, several = machine.get("nodes", 1), machine.get("ranks", 1), machine.get("nodes", 1) > 1
    on_gpu = machine["kind"] == "cuda"
    return {
        "nodes": nodes,
        "gpu": nodes * ranks if on_gpu else 0,
        "gpu_model": gpu_model(name) if on_gpu else None,
        "tasks": nodes if several else None,
        "mpi": "srun" if several else None,
        "cpus_per_task": CPUS * ranks,
    }[resource]


def rung_settings(name, rung):
    """What decides the record of a rung: the machine's settings, and the rungs that stand before it."""
    tree = machine_settings(name)
    rungs = tree.pop("rungs")
    tree.pop("title", None)
    if rung not in rungs:
        raise WorkflowError(f"hardware {name} has no rung {rung}; it has {', '.join(rungs)}")
    return json.dumps({**tree, "rungs": rungs[: rungs.index(rung) + 1]}, sort_keys=True)


def ladder_records(name):
    """The records of a ladder that is measured here; none where it is not."""
    rungs = machine_settings(name)["rungs"]
    return [f"results/records/ladder/{name}/{rung}.json" for rung in rungs] if name in MEASURED else []


def ladder_references(name):
    """The reference records of a ladder that is not measured here."""
    return [] if name in MEASURED else sorted(map(str, REFERENCE.glob(f"*/ladder_{name}_*.json")))


def training_file(name):
    """The settings of the long training that the write-up shows on a machine, as seen from the working directory."""
    training = machine_settings(name).get("training")
    if training is None:
        raise WorkflowError(f"hardware {name} has no long training: config/hardware/{name}.yaml names none")
    return os.path.relpath(SHIPPED / f"../models/{training}.yaml")


# Measured here, and shown with a long training.
DISTRIBUTED = [name for name in MEASURED if machine_settings(name).get("training")]
