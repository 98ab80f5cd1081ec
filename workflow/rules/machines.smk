# The machines of the write-up: which there are, which are measured here. Nothing here runs a step.

SHIPPED = Path(workflow.basedir, "../config/hardware")
REFERENCE = Path(workflow.basedir, "../results/reference")


# What the ladder is measured on: the machines that were asked for, or those that this one fits. By name: what the
# command line calls it. A file of one's own is called by its path.
MEASURED = {Path(argument).stem: argument for argument in (HERE["fits"] if ASKED == "auto" else ASKED)}
HARDWARE = sorted(HERE["machines"])


def machine_argument(name):
    """What the command line calls a machine."""
    return MEASURED.get(name, name)


def machine_settings(name):
    """What a machine's file says, checked, with its defaults."""
    if name not in HERE["machines"]:
        raise WorkflowError(f"there is no hardware {name}: {', '.join(HARDWARE)} are in config/hardware/")
    return HERE["machines"][name]


def machine_launch(name):
    """How a command that trains is started on a machine."""
    machine = machine_settings(name)
    return launch(machine["ranks"], machine["nodes"])


def allocation(name, resource):
    """What a job on a machine asks for; None: it does not. One task a node starts the ranks there, by srun on several."""
    machine = machine_settings(name)
    nodes, ranks, several = machine["nodes"], machine["ranks"], machine["nodes"] > 1
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
    rungs = tree["rungs"]
    if rung not in rungs:
        raise WorkflowError(f"hardware {name} has no rung {rung}; it has {', '.join(rungs)}")
    deciding = {key: value for key, value in tree.items() if key not in ("title", "training")}
    return json.dumps({**deciding, "rungs": rungs[: rungs.index(rung) + 1]}, sort_keys=True)


def batch_settings(name):
    """What a long training takes of a machine's file; how its ladder is measured is not of it."""
    return json.dumps({key: machine_settings(name)[key] for key in ("device", "batch_size", "block_size")})


def ladder_records(name):
    """The records of a ladder that is measured here; none where it is not."""
    rungs = machine_settings(name)["rungs"]
    return [f"results/records/ladder/{name}/{rung}.json" for rung in rungs] if name in MEASURED else []


def rung_before(name, rung):
    """The record of the rung before this one: a ladder is climbed in order and at one time, as machines have moods."""
    rungs = machine_settings(name)["rungs"]
    place = rungs.index(rung) if rung in rungs else 0
    return f"results/records/ladder/{name}/{rungs[place - 1]}.json" if place else []


def ladder_references(name):
    """The reference records of a ladder that is not measured here."""
    return [] if name in MEASURED else [local(str(path)) for path in sorted(REFERENCE.glob(f"*/ladder_{name}_*.json"))]


def training_file(name):
    """The settings of the long training that the write-up shows on a machine, as seen from the working directory."""
    training = machine_settings(name)["training"]
    if training is None:
        raise WorkflowError(f"hardware {name} has no long training: config/hardware/{name}.yaml names none")
    return os.path.relpath(SHIPPED / f"../models/{training}.yaml")


def fineweb_at_hand():
    """Whether the text of the long training is here or can be had; a job on a cluster was sent because it is."""
    if workflow.remote_exec or Path(f"{GPT2_TOKENS}/fineweb-edu/manifest.json").exists():
        return True
    return at_hub("fineweb-edu") != "unreachable"


# Measured here, and shown with a long training; without its text the report says "not measured here".
TRAINED = [name for name in MEASURED if machine_settings(name)["training"]]
DISTRIBUTED = TRAINED if TRAINED and fineweb_at_hand() else []
