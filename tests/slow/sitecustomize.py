"""What a process with this folder on PYTHONPATH does otherwise, so that a test meets it at a known place.

PICOGPT_TEST_HOLD=STEP:FILE  A training waits before this step until the file is there or a signal has come. Meanwhile FILE.held
                             has the number of its process.
PICOGPT_TEST_DEAF=1          Such a training hears no signal.
PICOGPT_TEST_LATE=FILE:S     This file of a training appears so many seconds after its end, as on a file system that lags.
PICOGPT_TEST_MEET=N:FOLDER   A shard is tokenized once N processes are there to tokenize one each.
PICOGPT_TEST_RANKS=FOLDER    Each rank of a job leaves a file there: its place on its node, and the GPUs that it sees.
PICOGPT_TEST_NET=FILE        What jobs of a cluster want of the network, by Python, goes there, a line each: of other machines, and of
                             the port of HF_ENDPOINT.

And Snakemake asks SLURM every two seconds, where the plugin waits ten more each time, as is right on a cluster.
"""

import atexit
import os
import subprocess
import sys
import time


def hold(step, file):
    from picogpt.train import loop

    def wait(trainer):
        if trainer.progress.step != int(step) or os.path.exists(file):
            return
        if trainer.world.is_main:
            with open(f"{file}.writing", "w") as note:
                note.write(str(os.getpid()))
            os.replace(f"{file}.writing", f"{file}.held")
        while not os.path.exists(file) and (os.environ.get("PICOGPT_TEST_DEAF") or not trainer.stop_signals):
            time.sleep(0.05)

    loop.CALLBACKS.append(wait)


def hide(file, seconds):
    os.rename(file, f"{file}.late")
    command = ["sh", "-c", 'sleep "$1" && mv "$2.late" "$2"', "sh", seconds, file]
    nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen(command, start_new_session=True, **nothing)


def meet(number, folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    deadline = time.monotonic() + 300
    while len(os.listdir(folder)) < int(number):
        if time.monotonic() > deadline:
            sys.exit("nobody else tokenizes")
        time.sleep(0.1)


def note_rank(folder):
    with open(os.path.join(folder, f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"), "w") as note:
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


def ask_often():
    from snakemake_executor_plugin_slurm import Executor

    Executor.next_seconds_between_status_checks = property(lambda executor: 2, lambda executor, seconds: None)


def given(name):
    """The parts of this variable; none where it is not set."""
    return [part for part in os.environ.get(f"PICOGPT_TEST_{name}", "").split(":") if part]


trains, tokenizes = ([command] == sys.argv[1:2] for command in ("train", "tokenize"))
if trains and given("HOLD"):
    hold(*given("HOLD"))
if trains and given("LATE"):
    atexit.register(hide, *given("LATE"))
if tokenizes and "--shard" in sys.argv and given("MEET"):
    meet(*given("MEET"))
if "RANK" in os.environ and given("RANKS"):
    note_rank(*given("RANKS"))
if "SLURM_JOB_ID" in os.environ and given("NET"):
    watch_network(*given("NET"))
if os.path.basename(sys.argv[0]) == "snakemake":
    ask_often()
