"""A SLURM cluster on this machine, for as long as a test needs it: munged, slurmctld and a slurmd for each node."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
LONGEST_S = 600
"""For anything to happen, on a machine with much else to do."""
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# Devices that exist everywhere take the place of GPUs: nobody opens them.
DEVICES = ("/dev/null", "/dev/zero")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={first_job}
# So long that a machine with much else to do does not meet them.
MinJobAge=3600
KillWait=60
MessageTimeout=100
TCPTimeout=30
BatchStartTimeout=300
UnkillableStepTimeout=600
SlurmdTimeout=0
OverTimeLimit=0
ReturnToService=0
GresTypes=gpu
JobSubmitPlugins=lua
{nodes}
{partitions}
"""

# As on clusters that bill: no job without an account, in one of the partitions.
SUBMIT = """\
function slurm_job_submit(job, partitions, user)
  if job.partition == "billed" and job.account == nil then
    slurm.log_user("partition billed takes no job without an account")
    return slurm.ERROR
  end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user)
  return slurm.SUCCESS
end
"""


def missing() -> str:
    """What is not here of what a cluster needs; empty where it is all here."""
    if os.geteuid() != 0:
        return "a SLURM cluster of one's own needs root"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the name of this machine, {socket.gethostname()}, has no address: ranks on several nodes meet by it"
    absent = [name for name in (*DAEMONS, *CLIENTS) if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurmctld, slurmd, slurm-client, munge)" if absent else ""


@dataclass
class Cluster:
    """Where it is, and how to ask it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """With this every SLURM command means this cluster."""
        return {"PATH": f"{self.folder}/bin:{PATH}", "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What a SLURM command answers."""
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **self.environment}, timeout=LONGEST_S
        )
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.stderr or run.stdout}\n{self.logs()}")
        return run.stdout.strip()

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives away meanwhile."""
    ports: list[int] = []
    for port in random.sample(range(20000, 32000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


@contextmanager
def running(folder: Path, partitions: dict[str, tuple[str, ...]], urgent: str) -> Iterator[Cluster]:
    """Start the daemons, a node each for the names in `partitions`; at the end stop what was started.

    Jobs of the partition `urgent` take the place of others on their nodes, which get 30 seconds.
    """
    cluster = Cluster(folder)
    nodes = list(dict.fromkeys(node for names in partitions.values() for node in names))
    host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(nodes))
    for name in ("munge", "state", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True)
    (folder / "munge/key").write_bytes(secrets.token_bytes(128))
    (folder / "munge/key").chmod(0o400)
    resources = f"CPUs=32 RealMemory=200000 Gres=gpu:h100:{len(DEVICES)} State=UNKNOWN"
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {resources}"
        for node, port in zip(nodes, ports[1:], strict=True)
    ]
    parts = [
        f"PartitionName={name} Nodes={','.join(names)} Default={'YES' if name == next(iter(partitions)) else 'NO'} State=UP"
        + (" PriorityTier=10 PreemptMode=OFF" if name == urgent else " PriorityTier=1 GraceTime=30")
        for name, names in partitions.items()
    ]
    configuration = CONFIGURATION.format(
        host=host, ports=ports, folder=folder, nodes="\n".join(lines), partitions="\n".join(parts),
        first_job=random.randrange(1, 9000),
    )  # fmt: skip
    (folder / "slurm.conf").write_text(configuration)
    (folder / "gres.conf").write_text("".join(f"Name=gpu Type=h100 File={device}\n" for device in DEVICES))
    (folder / "job_submit.lua").write_text(SUBMIT)
    # Inside of a job the plugin takes SLURM_CONF away from srun, which elsewhere needs none.
    (folder / "bin").mkdir()
    (folder / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    (folder / "bin/srun").chmod(0o755)
    munged = [
        "munged", "--foreground", "--force", "--num-threads=2",
        f"--key-file={folder}/munge/key", f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid",
        f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge.log",
    ]  # fmt: skip
    with ExitStack() as started:

        def start(*command: str) -> None:
            with open(folder / f"{Path(command[0]).name}.out", "a") as out:
                environment = {**os.environ, **cluster.environment}
                process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            started.callback(stop, process)

        start(*munged)
        wait_for(lambda: (folder / "munge/socket").exists(), "munged", cluster)
        start("slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        for node in nodes:
            start("slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf")
        wait_for(lambda: _states(cluster) == {"idle"}, "idle nodes", cluster)
        started.callback(_end_jobs, cluster)
        yield cluster


def _states(cluster: Cluster) -> set[str]:
    try:
        return set(cluster.ask("sinfo", "--noheader", "--Node", "--format=%t").split())
    except RuntimeError:
        return set()


def _end_jobs(cluster: Cluster) -> None:
    """No process of a job outlives the daemons. Without cgroups SLURM itself loses those whose parent has ended."""
    with suppress(RuntimeError, subprocess.TimeoutExpired):
        cluster.ask("scancel", "--user=root")
    mark = f"SLURM_CONF={cluster.folder}/slurm.conf\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (process / "environ").read_bytes()
            if mark in environment and b"SLURM_JOB_ID=" in environment:
                os.kill(int(process.name), signal.SIGKILL)


def wait_for(condition, what: str, cluster: Cluster, needed: subprocess.Popen | None = None) -> None:
    """Raises TimeoutError with the daemons' logs when it does not come true, or `needed` ends before that."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        if needed and needed.poll() is not None:
            raise TimeoutError(f"{what}: what should bring it has ended with {needed.returncode}\n{cluster.logs()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {LONGEST_S} s\n{cluster.logs()}")
        time.sleep(0.3)


def birth(process: int) -> str | None:
    """When a process began, in the kernel's ticks; None where there is none of this number."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
