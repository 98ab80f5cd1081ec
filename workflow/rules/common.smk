# Names that several topics share. Nothing here runs a step.

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import yaml
from filelock import FileLock, Timeout
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

# Bash stops at the first error, as by default; and `.venv/bin/snakemake` works without activating the environment.
# With --sdm conda the environment's own picogpt must come first.
if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
    shell.prefix(f'set -euo pipefail; export PATH="{Path(sys.executable).parent}:$PATH"; ')

MODELS = ["char_bigram", "char_transformer"]
RUN = config["run"]
TOKENS = f"weights/char_tokenizer/{RUN}"
GPT2_TOKENS = f"weights/gpt2_tokenizer/{RUN}"


wildcard_constraints:
    model="|".join(MODELS),
    gpt2="gpt2|gpt2-pretrained",
    dtype="float32|bfloat16|int8",


def hold_folder():
    """Let one pipeline at a time work here. The lock dies with its process, so that a killed one needs no --unlock."""
    global pipeline_lock
    pipeline_lock = FileLock(".snakemake/pipeline.lock")
    try:
        pipeline_lock.acquire(timeout=0)
    except Timeout:
        raise WorkflowError("another pipeline is running in this folder: wait for it to end")


def own_text():
    """Whether `corpus` is the path of a file, as my.txt or texts/mine, and not the name of a registered corpus."""
    text = config["corpus"]
    return isinstance(text, str) and (Path(text).suffix != "" or len(Path(text).parts) > 1)


def corpus_file():
    """The text that everything stands on: the user's own file, or what is fetched."""
    if own_text() and not Path(config["corpus"]).is_file():
        # Snakemake would be content with the tokens of another text, where an earlier run has left some.
        raise WorkflowError(
            f"there is no text {config['corpus']}: `corpus` is the path of a UTF-8 file, or a registered name"
        )
    return config["corpus"] if own_text() else "resources/corpus.txt"


def corpus_name():
    """The text that was asked for, for file names. Where another had to serve, what is inside says so."""
    text = config["corpus"]
    return (
        re.sub(r"[^A-Za-z0-9._-]+", "_", Path(text).stem)
        if own_text()
        else ([text] if isinstance(text, str) else text)[0]
    )


def picogpt(*arguments):
    """What the command line answers, for what has to be known before there is a plan."""
    answer = subprocess.run([sys.executable, "-m", "picogpt", *arguments], capture_output=True, text=True)
    if answer.returncode:
        raise WorkflowError(answer.stderr.strip() or f"picogpt {' '.join(arguments)} failed")
    return answer.stdout.strip()


def hub_state():
    """
    Whether the hub is to be asked: unreachable, or else which try it is. While what it gave is here, that one; and
    one that refused (a mirror without these weights, no login) is asked again when resources/pretrained.txt is deleted.
    """
    if workflow.remote_exec:
        return "not asked by a job on a cluster"
    status = Path("resources/pretrained.txt")
    lines = status.read_text().splitlines() if status.exists() else []
    state = at_hub("pretrained")
    refused = f": refused: the hub ({os.environ.get('HF_ENDPOINT', 'https://huggingface.co')})"
    if lines and (lines[0].endswith(": here") and state != "reachable" or refused in lines[0]):
        return lines[-1]
    if state == "unreachable":
        return state
    return f"reachable, after {status.stat().st_mtime:.0f}" if lines else "reachable"


def at_hub(name):
    """What of the hub's files is here, or else whether it answers; not for a job on a cluster."""
    return dict(zip(HUB_NAMES, HUB.result().splitlines(), strict=True))[name]


def what_is_here():
    """What this machine is, and all machines' settings. A job on a cluster is told what the pipeline found that sent it."""
    known = os.environ.get("PICOGPT_HERE", "")
    if not (workflow.remote_exec and known):
        known = picogpt("hardware", "--json", *([] if ASKED == "auto" else ASKED))
        os.environ.update(PICOGPT_HERE=known)
    return json.loads(known)


def refuse_auto():
    """The machine that submits jobs to a cluster cannot speak for those that run them."""
    asked = {"size": config["size"], "gpus": config["gpus"], "ladder: hardware": config["ladder"]["hardware"]}
    auto = [f"{key}: auto" for key, value in asked.items() if value == "auto"]
    if auto and not workflow.local_exec:
        raise WorkflowError(
            f"{', '.join(auto)} would ask this machine, and the jobs run on others. workflow/profiles/slurm names them"
            " under config; --config on the command line takes the place of that list, so repeat it there"
        )


# What SLURM says when it takes a job not, and what to change then.
PROFILE = "workflow/profiles/slurm/config.yaml"
ADVICE = {
    "account": f"default-resources: slurm_account in {PROFILE} says who pays: sacctmgr show associations user=$USER format=account",
    "invalid partition": f"default-resources: slurm_partition in {PROFILE} must be one of the cluster's: sinfo -s",
    "Requested node configuration is not available": "no node of the partition has so many GPUs, cores, or so much memory, which"
    " set-resources: RULE: mem_mb, cpus_per_task in the profile change: sinfo -o '%P %D %c %m %G' lists what they have; `ranks` and `nodes` in config/hardware/ ask for GPUs",
    "Invalid generic resource": f"config: gpu_model in {PROFILE} must be what the cluster calls its GPUs: sinfo -o %G",
    "time limit": f"set-resources: RULE: runtime in {PROFILE} shortens what is longer than the partition allows: sinfo -o '%P %l'",
}


def advise(logs):
    """Say what to change where SLURM took a job not; `logs` are files of Snakemake's own log."""
    text = "\n".join(Path(log).read_text() for log in ([logs] if isinstance(logs, str) else logs))
    told = ("sbatch: error", "sbatch failed", "appears to be invalid", "The 'sacctmgr' reported")
    refused = [line for line in text.splitlines() if any(words in line for words in told)]
    for words, advice in ADVICE.items():
        if any(words in line for line in refused):
            print(f"picogpt: {advice} (docs/slurm.md)", file=sys.stderr)


def launch(ranks, nodes=1):
    """
    How a command that trains is started: one process for each of several devices, on one node or on those of a SLURM job.

    Jobs that meet on the same node have ports of their own, by their number, below those that Linux gives away.
    """
    # A rank that is lost is replaced once, from the last checkpoint; one that was told to stop has time to save.
    torchrun = f"torchrun --nproc_per_node={ranks} --max-restarts=1 --shutdown-timeout=100"
    if nodes == 1:
        return f"{torchrun} --standalone -m picogpt" if ranks > 1 else "picogpt"
    return (
        "srun --jobid=${SLURM_JOB_ID:?several nodes need snakemake --workflow-profile workflow/profiles/slurm}"
        f" --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1"
        # Each attempt with a store of its own: the nodes need not agree on how many there were.
        " env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        f" {torchrun} --nnodes={nodes} --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID"
        " --rdzv-endpoint=$(hostname):$((10000 + SLURM_JOB_ID % 20000)) -m picogpt"
    )


def settings_file(model):
    """The YAML file of a model's settings, as seen from the working directory."""
    if config[model]["config"] != "auto":
        return config[model]["config"]
    single = Path(workflow.basedir, f"../config/models/{model}.yaml")
    return os.path.relpath(single if single.exists() else single.with_stem(f"{model}_{SIZE}"))


def settings(model):
    """What decides the result of a model's training, as text."""
    return deciding(settings_file(model))


def deciding(path):
    """The settings of a file that decide a result, as text: without its comments and without `runtime`."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise WorkflowError(f"cannot read the settings {path}: {error}")
    if not isinstance(tree, dict):
        raise WorkflowError(f"{path} has no settings: config/models/ shows how such a file looks")
    return json.dumps({key: value for key, value in tree.items() if key != "runtime"}, sort_keys=True)


def ranks_for(gpus):
    """Of the GPUs that are here as many as divide the batch of GPT-2's training; of a number that was asked for, all."""
    batch = json.loads(settings("gpt2")).get("train", {}).get("batch_size", 16)
    for pair in config["gpt2"]["set"]:
        key, _, value = pair.partition("=")
        if key == "train.batch_size" and value.isdigit():
            batch = int(value)
    fitting = [ranks for ranks in range(1, gpus + 1) if batch % ranks == 0]
    if config["gpus"] != "auto" and gpus and gpus not in fitting:
        raise WorkflowError(
            f"gpus: {gpus} do not divide the batch of {batch} sequences of {settings_file('gpt2')}: "
            f"{', '.join(map(str, fitting))} would, or another train.batch_size"
        )
    return max(fitting, default=1)


# Asked before there is a plan: the hub, in the background as that takes a second, and what is here: which settings of a model fit it, how many GPUs, which files of
# config/hardware/; and all those files.
HUB_NAMES = ["pretrained", "fineweb-edu"]
HUB = (
    None
    if workflow.remote_exec
    else ThreadPoolExecutor(1).submit(picogpt, "fetch", "--check", *HUB_NAMES, "--shard", "0")
)
ASKED = config["ladder"]["hardware"]
HERE = what_is_here()
SIZE = HERE["size"] if config["size"] == "auto" else config["size"]
FAST_DTYPE = HERE["dtype"] if SIZE == HERE["size"] else {"gpu": "bfloat16", "cpu": "float32"}[SIZE]
CORPUS = corpus_name()
GPT2 = f"weights/gpt2/{RUN}/{CORPUS}"
# Several GPUs: one rank each. A plain command on one device.
GPUS = (HERE["gpus"] if config["gpus"] == "auto" else config["gpus"]) if SIZE == "gpu" else 0
RANKS = ranks_for(GPUS)
# What a rank has of a cluster's node beside its device, and how a training hears of its end: SLURM sends SIGTERM to all
# processes of a job step. The trainer saves and ends; the shell and tee, which would end at once, wait for it.
CPUS = 8
HEAR_THE_END = "trap '' TERM; "
# A file of the source tree is read where it lies, whatever holds the others.
PUBLISHED = local(str(Path(workflow.basedir, "../config/published.yaml")))


def gpu_model(hardware="default"):
    """What the cluster calls the GPUs of a machine; None where any GPU serves."""
    names = config["gpu_model"]
    return (names.get(hardware) if isinstance(names, dict) else names) or None


def gpt2_weights(kind):
    """The file that a step with this GPT-2 waits for."""
    return "resources/pretrained.txt" if kind == "gpt2-pretrained" else f"{GPT2}/best.pt"


def gpt2_arguments(kind):
    """How the command line names this GPT-2; where OpenAI's could not be had, its record says so."""
    return [kind, "--optional"] if kind == "gpt2-pretrained" else [kind, "--ckpt", f"{GPT2}/best.pt"]
