"""What a process with this folder on PYTHONPATH does otherwise, so that a test meets it at a known place.

PICOGPT_TEST_HOLD=STEP:FILE  A training waits before this step until the file is there or a signal has come. Meanwhile FILE.held
                             has the number of its process.
PICOGPT_TEST_DEAF=1          Such a training hears no signal.
PICOGPT_TEST_MEET=N:FOLDER   A shard is tokenized once N processes are there to tokenize one each.
PICOGPT_TEST_RANKS=FOLDER    Each rank of a job leaves a file there: its place on its node, and the GPUs that it sees.
PICOGPT_TEST_NET=FILE        What jobs of a cluster want of the network, by Python, goes there, a line each: of other machines, and of
                             the port of HF_ENDPOINT.
PICOGPT_TEST_LATE=NAME:S     A file of this name appears so many seconds after it was written, as on a file system that lags.

And Snakemake asks SLURM every two seconds, where the plugin waits ten more each time, as is right on a cluster.
"""

import contextlib
import importlib.abc
import importlib.util
import os
import subprocess
import sys
import time


def hold(module):
    held, _, file = os.environ["PICOGPT_TEST_HOLD"].partition(":")
    step, watch, signals = module.Trainer._step, module._stop_on_signals, []

    @contextlib.contextmanager
    def watched(*arguments):
        with watch(*arguments) as received:
            signals.append(received)
            yield received

    def waiting(trainer, index):
        if index == int(held) and not os.path.exists(file):
            if trainer.world.is_main:
                with open(f"{file}.writing", "w") as note:
                    note.write(str(os.getpid()))
                os.replace(f"{file}.writing", f"{file}.held")
            while not os.path.exists(file) and (os.environ.get("PICOGPT_TEST_DEAF") or not signals[-1]):
                time.sleep(0.05)
        return step(trainer, index)

    module.Trainer._step, module._stop_on_signals = waiting, watched


def late(name, seconds):
    replace = os.replace

    def later(source, target, **rest):
        if os.path.basename(target) != name:
            return replace(source, target, **rest)
        replace(source, f"{target}.late")
        command = ["sh", "-c", 'sleep "$1" && mv "$2.late" "$2"', "sh", seconds, str(target)]
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(command, start_new_session=True, **nothing)

    os.replace = later


def meet(module):
    number, _, folder = os.environ["PICOGPT_TEST_MEET"].partition(":")
    tokenize, deadline = module.tokenize, time.monotonic() + 300

    def together(*arguments, **named):
        with open(os.path.join(folder, str(os.getpid())), "w"):
            pass
        while len(os.listdir(folder)) < int(number):
            if time.monotonic() > deadline:
                raise RuntimeError("nobody else tokenizes")
            time.sleep(0.1)
        return tokenize(*arguments, **named)

    module.tokenize = together


def note_ranks(module):
    if "RANK" in os.environ:
        name = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        with open(os.path.join(os.environ["PICOGPT_TEST_RANKS"], name), "w") as note:
            note.write(f"{os.environ['LOCAL_RANK']} of {os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}")


def watch_network(file):
    here = {"127.0.0.1", "::1", "localhost", os.uname().nodename, "", None}
    hub = os.environ.get("HF_ENDPOINT", "").rpartition(":")[2]

    def note(event, arguments):
        if event == "socket.getaddrinfo":
            host, port = arguments[:2]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host, port = arguments[1][:2]
        else:
            return
        if host not in here or str(port) == hub:
            with open(file, "a") as lines:
                lines.write(f"{' '.join(sys.argv)}: {host}:{port}\n")

    sys.addaudithook(note)


def ask_often(module):
    module.Executor.next_seconds_between_status_checks = property(lambda executor: 2, lambda executor, seconds: None)


class Change(importlib.abc.MetaPathFinder):
    """Changes a module once it has been imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Change("snakemake_executor_plugin_slurm", ask_often))
if os.environ.get("PICOGPT_TEST_HOLD"):
    sys.meta_path.insert(0, Change("picogpt.train.loop", hold))
if os.environ.get("PICOGPT_TEST_MEET"):
    sys.meta_path.insert(0, Change("picogpt.data.fineweb", meet))
if os.environ.get("PICOGPT_TEST_RANKS"):
    sys.meta_path.insert(0, Change("picogpt.train.distributed", note_ranks))
if os.environ.get("PICOGPT_TEST_NET") and "SLURM_JOB_ID" in os.environ:
    watch_network(os.environ["PICOGPT_TEST_NET"])
if os.environ.get("PICOGPT_TEST_LATE"):
    late(*os.environ["PICOGPT_TEST_LATE"].split(":"))
