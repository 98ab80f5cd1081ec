# What is checked before a run of Snakemake starts, and what is said when it fails. Nothing here runs a step.

import yaml
from filelock import FileLock, Timeout


def check_start():
    """Refuse a second pipeline in this folder, timings side by side, and settings that only another machine knows."""
    global pipeline_lock  # Snakemake's own lock would outlive a killed pipeline; this one does not
    pipeline_lock = FileLock(".snakemake/pipeline.lock")
    try:
        pipeline_lock.acquire(timeout=0)
    except Timeout:
        raise WorkflowError("another pipeline is running in this folder: wait for it to end")
    if workflow.local_exec and "machine" not in workflow.global_resources:
        raise WorkflowError(
            "no profile limits the resource `machine`, so jobs that measure time would run side by side: leave out"
            " --workflow-profile none, or pass --resources machine=100 --default-resources machine=1"
        )
    if PLAN["detected"] and not workflow.local_exec:
        raise WorkflowError(
            f"{', '.join(f'{key}: auto' for key in PLAN['detected'])} would ask this machine, and the jobs run on others."
            " profiles/slurm/profile.yaml sets them under config; --config on the command line replaces that list, so"
            " repeat it there"
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
