# Names that several topics share. Nothing here runs a step.

import json
import os
import subprocess
import sys

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


wildcard_constraints:
    model="|".join(MODELS),


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
    return config["corpus"] if own_text() else "resources/corpus.txt"


def machine_size():
    """cpu or gpu: which settings of a model fit this machine."""
    if config["size"] != "auto":
        return config["size"]
    command = [sys.executable, "-m", "picogpt", "hardware", "--size"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def settings_file(model):
    """The YAML file of a model's settings, as seen from the working directory."""
    if config[model]["config"] != "auto":
        return config[model]["config"]
    single = Path(workflow.basedir, f"../config/models/{model}.yaml")
    return os.path.relpath(single if single.exists() else single.with_stem(f"{model}_{SIZE}"))


def settings(model):
    """What decides the result of a training, as text: the file without its comments and without `runtime`."""
    tree = yaml.safe_load(Path(settings_file(model)).read_text())
    return json.dumps({key: value for key, value in tree.items() if key != "runtime"}, sort_keys=True)


SIZE = machine_size()
