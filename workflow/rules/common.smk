# What several topics share: the answer of `picogpt plan`, names of folders, short look-ups. Nothing here runs a step.

import json
import os
import subprocess
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

ROOT = Path(str(workflow.current_basedir)).parents[1]
# Jobs use the commands beside this Python, also where its environment is not activated, and the config/ of this workflow.
os.environ.update(PATH=f"{Path(sys.executable).parent}:{os.environ.get('PATH')}", PICOGPT_CONFIG=str(ROOT / "config"))


def ask_for_plan():
    """The answer of `picogpt plan`. A job on a cluster takes the one that the submitting process got."""
    if not (workflow.remote_exec and "PICOGPT_PLAN" in os.environ):
        command = [sys.executable, "-m", "picogpt", "plan", "-"]
        answer = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True)
        if answer.returncode:
            print(answer.stderr.strip(), file=sys.stderr)
            sys.exit(1)  # of an exception Snakemake would print lines of this file too
        os.environ.update(PICOGPT_PLAN=answer.stdout)
    return json.loads(os.environ.get("PICOGPT_PLAN"))


PLAN = ask_for_plan()
RUN = config["run"]
CORPUS = PLAN["corpus"]
MODELS = ["char_bigram", "char_transformer"]
TOKENS = f"weights/char_tokenizer/{RUN}"
GPT2_TOKENS = f"weights/gpt2_tokenizer/{RUN}"
GPT2 = f"weights/gpt2/{RUN}/{CORPUS}"
GPT2_MODELS = ["gpt2", "gpt2-pretrained"] if config["gpt2"].get("pretrained", True) else ["gpt2"]


wildcard_constraints:
    model="|".join(MODELS),
    gpt2="gpt2|gpt2-pretrained",
    dtype="float32|bfloat16|int8",
    streams="[0-9]+",
    hardware=r"[A-Za-z0-9_-]+",
    rung=r"[a-z0-9_]+",


def look_up(table, name, what):
    """`table[name]`, or an error that lists the valid names."""
    names = [key for key, value in table.items() if value is not None]
    if name not in names:
        raise WorkflowError(f"there is no {what} called {name}: there are {', '.join(names)}")
    return table[name]


def machine(wildcards, entry):
    """This entry of the plan for the machine {hardware}."""
    plan = look_up(PLAN["machines"], wildcards.hardware, "hardware")
    return look_up(plan, entry, f"entry of hardware {wildcards.hardware}")


def rung(wildcards):
    """The plan for the rung {rung} of the machine {hardware}."""
    return look_up(machine(wildcards, "ladder"), wildcards.rung, f"rung of hardware {wildcards.hardware}")


MACHINE_RESOURCES = {key: lambda wildcards, key=key: machine(wildcards, "resources")[key] for key in PLAN["resources"]}


def hub_status(wildcards):
    """The file with the answers of the hub and the like, as an input. Its age does not matter, only its content (see fetch_hub)."""
    return ancient(checkpoints.fetch_hub.get().output[0])


def hub_answer(name):
    """The hub's answer about a file: here, refused or unreachable. A file that was not requested counts as here."""
    return json.loads(Path(hub_status(None)).read_text())["files"].get(name, {"state": "here"})["state"]


def long_trainings(pattern):
    """This file of each long training whose text is here or can be had, as a function of wildcards."""
    names = PLAN["long_trainings"]
    return lambda wildcards: expand(pattern, name=names if hub_answer("fineweb-edu/0") == "here" else [])
