# What is checked before a run of Snakemake starts, and what is said when it fails. Nothing here runs a step.

import yaml
from filelock import FileLock, Timeout


def check_start():
    """Stop if another pipeline runs here, if timed jobs could overlap, or if `auto` would describe the wrong machine."""
    global pipeline_lock  # not Snakemake's own lock, which a killed pipeline leaves behind
    pipeline_lock = FileLock(".snakemake/pipeline.lock")
    try:
        pipeline_lock.acquire(timeout=0)
    except Timeout:
        raise WorkflowError("another pipeline is running in this folder: wait for it to end")
    if workflow.local_exec and "machine" not in workflow.global_resources:
        raise WorkflowError(
            "no profile limits the resource `machine`, so timed jobs would overlap: leave out --workflow-profile none,"
            " or pass --resources machine=100 --default-resources machine=1"
        )
    if PLAN["detected"] and not workflow.local_exec:
        raise WorkflowError(
            f"{', '.join(f'{key}: auto' for key in PLAN['detected'])} would describe this machine, but jobs run on others:"
            " set them under config in the profile; --config replaces that whole section, so pass all of its keys"
        )


def advise(logs):
    """Say what to change where SLURM refused a job; `logs` are files of Snakemake's own log."""
    text = "\n".join(Path(log).read_text() for log in ([logs] if isinstance(logs, str) else logs))
    signs = ("sbatch: error", "sbatch failed", "appears to be invalid", "The 'sacctmgr' reported")
    refused = [line for line in text.splitlines() if any(sign in line for sign in signs)]
    for words, advice in yaml.safe_load((SOURCE / "profiles/slurm/advice.yaml").read_text()).items():
        if any(words in line for line in refused):
            print(f"picogpt: {advice} (docs/slurm.md)", file=sys.stderr)


onstart:
    check_start()


onerror:
    advise(log)
