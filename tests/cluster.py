"""A SLURM cluster on this machine, munged, slurmctld and a slurmd for each node, and the pipeline on it."""

from __future__ import annotations

import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from conftest import ROOT
from pipeline import NO_HUB, command, source_tree

from picogpt import checkpoint, records

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
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
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
GresTypes=gpu
JobSubmitPlugins=lua
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

    def ask(self, *command: object) -> str:
        """What a SLURM command answers. Raises RuntimeError, with what it said, where it fails."""
        words = list(map(str, command))
        run = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, **self.environment}, timeout=LONGEST_S
        )
        if run.returncode:
            raise RuntimeError(f"{' '.join(words)}: {run.stderr or run.stdout}\n{self.logs()}")
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
    _write_settings(folder, nodes, partitions, urgent)
    with ExitStack() as started:

        def start(*command: str) -> None:
            with open(folder / f"{command[0]}.out", "a") as out:
                environment = {**os.environ, **cluster.environment}
                process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            started.callback(stop, process)

        files = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "seed")]
        files += [f"--log-file={folder}/munge.log", f"--socket={folder}/munge/socket"]
        start("munged", "--foreground", "--force", "--num-threads=2", *files)
        wait_for(lambda: (folder / "munge/socket").exists(), "munged", cluster)
        start("slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        for node in nodes:
            start("slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf")
        wait_for(lambda: _states(cluster) == {"idle"}, "idle nodes", cluster)
        started.callback(_end_jobs, cluster)
        yield cluster


def _write_settings(folder: Path, nodes: list[str], partitions: dict[str, tuple[str, ...]], urgent: str) -> None:
    host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(nodes))
    for name in ("bin", "munge", "state", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True)
    (folder / "munge/key").write_bytes(secrets.token_bytes(128))
    (folder / "munge/key").chmod(0o400)
    resources = f"CPUs=32 RealMemory=200000 Gres=gpu:h100:{len(DEVICES)} State=UNKNOWN"
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {resources}"
        for node, port in zip(nodes, ports[1:], strict=True)
    ]
    for name, names in partitions.items():
        priority = "PriorityTier=10 PreemptMode=OFF" if name == urgent else "PriorityTier=1 GraceTime=30"
        lines.append(f"PartitionName={name} Nodes={','.join(names)} State=UP {priority}")
    first_job = random.randrange(1, 9000)
    configuration = CONFIGURATION.format(host=host, port=ports[0], folder=folder, first_job=first_job)
    (folder / "slurm.conf").write_text("\n".join([configuration, *lines, ""]))
    (folder / "gres.conf").write_text("".join(f"Name=gpu Type=h100 File={device}\n" for device in DEVICES))
    (folder / "job_submit.lua").write_text(SUBMIT)
    # Inside of a job the plugin takes SLURM_CONF away from srun, which elsewhere needs none.
    (folder / "bin/srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    (folder / "bin/srun").chmod(0o755)


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


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class Started:
    """A Snakemake that runs."""

    process: subprocess.Popen[bytes]
    out: Path

    def end(self, status: int = 0) -> str:
        """Wait for its end, with this status; return what was printed."""
        self.process.wait(LONGEST_S)
        assert self.process.returncode == status, self.out.read_text()
        return self.out.read_text()


class Pipeline:
    """Snakemake in a copy of the folder `prepared`, through the shipped profile with this cluster's values.

    Where that copy has a copy of the source tree in it, this one runs.
    """

    training: Started
    """The one that `start_held` has started."""
    waiting: int | None = None
    """A file descriptor of the process that waited first; another that takes its place is not it."""

    def __init__(
        self,
        cluster: Cluster,
        prepared: Path,
        folder: Path,
        partition: str,
        hardware: tuple[str, ...] = ("box.yaml",),
        account: str | None = None,
        **changes: object,
    ):
        self.cluster, self.partition = cluster, partition
        self.folder = Path(shutil.copytree(prepared, folder))
        self.started = 0
        profile = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())
        resources = profile["default-resources"]
        del resources["slurm_account"]  # this cluster does no accounting
        resources.update({"slurm_partition": partition, **({"slurm_account": account} if account else {})})
        profile["config"].update(gpus=0, ladder={"hardware": list(hardware)})
        profile.update({"slurm-init-seconds-before-status-checks": 1, "slurm-status-command": "squeue"}, **changes)
        (self.folder / "profile").mkdir()
        (self.folder / "profile/profile.yaml").write_text(yaml.safe_dump(profile))

    def start(self, *arguments: str, **environment: str) -> Started:
        self.started += 1
        out = self.folder / f"out{self.started}.txt"
        environment = {
            **os.environ, **NO_HUB, **self.cluster.environment,
            "PYTHONPATH": f"{ROOT / 'tests/slow'}:{source_tree(self.folder)}",
            "PICOGPT_TEST_NET": str(self.folder / "network.txt"),
            **environment,
        }  # fmt: skip
        line = command(self.folder, *arguments, "--workflow-profile", self.folder / "profile")
        with open(out, "wb") as file:
            return Started(subprocess.Popen(line, stdout=file, stderr=file, cwd=self.folder, env=environment), out)

    def run(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run it, which ends with this status; return what was printed."""
        return self.start(*arguments, **environment).end(status)

    def start_held(self, run: str, step: int, **environment: str) -> None:
        """Start a training that waits before this step."""
        self.training = self.start(f"{run}/record.json", PICOGPT_TEST_HOLD=f"{step}:{self.folder}/go", **environment)

    def held(self) -> None:
        """Wait until that training waits."""
        note = self.folder / "go.held"
        wait_for(note.exists, "a training", self.cluster, self.training.process)
        self.waiting = self.waiting or os.pidfd_open(int(note.read_text()))

    def ended(self) -> bool:
        """Whether the process that waited is gone."""
        return bool(select.select([self.waiting], [], [], 0)[0])

    def go(self) -> None:
        """Let the training go on."""
        (self.folder / "go").touch()

    def go_at_once(self) -> None:
        """Let the training go on that SLURM has put back into the queue, where by itself it waits two minutes."""
        self.go()
        for job in self.ask("%A", "PD"):
            self.cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def ask(self, what: str, states: str = "R") -> list[str]:
        """What SLURM says of the jobs of this partition."""
        options = (f"--partition={self.partition}", f"--states={states}", f"--format={what}")
        return self.cluster.ask("squeue", "--noheader", *options).split()

    def sessions(self, run: str) -> int:
        """How often this training was started or resumed."""
        return records.read(self.folder / run / "record.json")["results"]["sessions"]

    def saved_step(self, run: str) -> int:
        return checkpoint.load_state(self.folder / run / "checkpoints/last.pt")[0]["progress"]["step"]
