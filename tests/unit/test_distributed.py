"""Several ranks, started by the real torchrun, over gloo on this machine's CPUs."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT, SMALL_RUNTIME, gpt2_config

from picogpt import checkpoint, hardware, records
from picogpt.config import Experiment, GPT2Config
from picogpt.errors import UsageError
from picogpt.train.distributed import World, init_distributed
from picogpt.train.step import micro_batch_size, tokens_at_once

RANK = ROOT / "tests/rank.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = {
    "dtype": "float32", "steps": 20, "batch_size": 8, "learning_rate": 0.01, "grad_clip": 1.0, "weight_decay": 0.1,
    "warmup_steps": 4, "eval_interval": 5,
    "eps": 1e-6,  # the gradient of a key's bias is zero but for rounding, which AdamW would blow up to full steps
}  # fmt: skip


def script(folder: Path, tokens: Path, misfortune: str = "none", compile: str = "off", **train: object) -> list[str]:
    """The arguments of rank.py for a run in `folder`."""
    runtime = {**SMALL_RUNTIME, "compile": compile}
    experiment = Experiment(model=gpt2_config(n_layer=2), train={**TRAIN, **train}, runtime=runtime)
    return [str(folder), str(tokens), experiment.model_dump_json(), misfortune]


def run(ranks: int, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    if ranks == 1:
        return forked.run("rank", *arguments, timeout=120)
    options = ["--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    return subprocess.run([*TORCHRUN, *options, RANK, *arguments], capture_output=True, text=True, timeout=120)


def results(folder: Path) -> dict:
    return records.read(folder / "record.json")["results"]


def saved(folder: Path) -> dict:
    return checkpoint.load_state(folder / "checkpoints/last.pt")[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokens_folder: Path) -> Path:
    """A run of one rank that accumulates over four micro-batches."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = run(1, *script(folder, tokens_folder, micro_batch_size=2))
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(folder: Path, alone: Path) -> None:
    """Within float32's rounding of sums in another order."""
    ours, expected = (checkpoint.load_weights(path / "best.pt").state for path in (folder, alone))
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name
    assert results(folder)["val_loss_after"] == pytest.approx(results(alone)["val_loss_after"], abs=1e-5)
    rows = (records.read_lines(path / "metrics.jsonl") for path in (folder, alone))
    for ours_row, expected_row in zip(*rows, strict=True):
        losses = {key: value for key, value in expected_row.items() if key in ("step", "train_loss", "val_loss")}
        assert {key: ours_row.get(key) for key in losses} == pytest.approx(losses, abs=1e-5)


def test_two_ranks_equal_one_with_accumulation(alone, tokens_folder, tmp_path):
    done = run(2, *script(tmp_path, tokens_folder, "count", micro_batch_size=2))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exchanges").read_text() == "20"  # once a step, though each has two micro-batches
    assert_same(tmp_path, alone)
    assert records.read(tmp_path / "record.json")["ranks"] == 2
    assert done.stderr.count("before training") == 1  # one rank speaks


@pytest.mark.parametrize(("before", "after", "everyone"), [(2, 1, False), (2, 1, True), (1, 2, False)])
def test_a_stopped_run_goes_on_with_any_number_of_ranks(
    alone, tokens_folder, tmp_path, before: int, after: int, everyone: bool
):
    # Settings must be the same in both parts, so each rank takes what suits it.
    arguments = [RANK, *script(tmp_path, tokens_folder, "linger")]
    launcher = [sys.executable] if before == 1 else [*TORCHRUN, "--standalone", f"--nproc_per_node={before}"]
    started = subprocess.Popen([*launcher, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if everyone:  # as SLURM does; torchrun sends the same to its ranks once more
        for rank in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
            os.kill(int(rank), signal.SIGTERM)
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=300)
    assert started.returncode != 0
    assert errors.count("picogpt: stopped by SIGTERM at step") == 1, errors
    assert 5 < saved(tmp_path)["progress"]["step"] < 20
    done = run(after, *script(tmp_path, tokens_folder))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)
    assert results(tmp_path)["sessions"] == 2


@pytest.mark.parametrize("misfortune", ["die:1:12", "die:0:12"])
def test_a_dead_rank_ends_the_job_with_one_message(tokens_folder, tmp_path, misfortune: str):
    done = run(2, *script(tmp_path, tokens_folder, misfortune))
    assert done.returncode == 1
    assert done.stderr.count("picogpt: another rank of this job has ended") == 1, done.stderr
    assert "Traceback" not in done.stderr.split("picogpt: another")[0]
    assert saved(tmp_path)["progress"]["step"] == 7


def test_a_dead_rank_is_replaced_and_the_run_goes_on(alone, tokens_folder, tmp_path):
    done = run(2, *script(tmp_path, tokens_folder, "die:1:12"), restarts=1)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)
    assert results(tmp_path)["sessions"] == 2


@pytest.mark.slow
def test_a_dead_rank_of_two_nodes_is_replaced_and_the_run_goes_on(alone, tokens_folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"]
    line = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *rendezvous, "--max-restarts=1", RANK]
    line += script(tmp_path, tokens_folder, "die:1:12")
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "".join(errors)
    assert_same(tmp_path, alone)
    assert results(tmp_path)["sessions"] == 2


@pytest.mark.slow
def test_where_nothing_can_be_compiled_the_ranks_go_on_without(alone, tokens_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = run(2, *script(tmp_path / "run", tokens_folder, "compile", compile="auto", micro_batch_size=2))
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stderr
    assert_same(tmp_path / "run", alone)


def test_a_loss_that_is_no_number_on_one_rank_stops_all_at_its_step(tokens_folder, tmp_path):
    done = run(2, *script(tmp_path, tokens_folder, "nan:1:9"))
    assert done.returncode == 1
    assert done.stderr.count("picogpt: the loss is nan at step 10") == 1, done.stderr
    assert saved(tmp_path)["progress"]["step"] == 7
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path)["model"].values())


def test_a_batch_that_does_not_divide_says_what_would(tokens_folder, tmp_path):
    done = run(2, *script(tmp_path, tokens_folder, batch_size=7))
    assert done.returncode == 1  # torchrun's own status
    assert done.stderr.count("train.batch_size=7 does not divide over 2 ranks: with 2 ranks, 6 or 8 would") == 1
    assert "--nproc_per_node of 1, 7 would" in done.stderr
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(UsageError, match=r"batch_size=1 does not divide over 4 ranks: with 4 ranks, 4 would"):
        micro_batch_size(1, 4, None, 99)
    with pytest.raises(UsageError, match=r"micro_batch_size=3 does not divide the 4 sequences .* these do: 1, 2, 4"):
        micro_batch_size(8, 2, 3, 99)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((8, 1, None, 99), 8), ((8, 2, None, 99), 4), ((12, 1, None, 5), 4), ((7, 1, None, 3), 1), ((8, 2, 2, 99), 2), ((8, 1, 8, 1), 8)],
)  # fmt: skip
def test_micro_batches_fill_what_the_device_takes(arguments: tuple, expected: int):
    """Arguments: sequences, ranks, micro-batch in the settings, most sequences that the device takes."""
    assert micro_batch_size(*arguments) == expected


def test_a_small_gpu_takes_fewer_tokens_at_once(monkeypatch):
    model, gpu = GPT2Config(kind="gpt2"), hardware.Device("a GPU", "cuda:0", "bfloat16")
    monkeypatch.setattr(hardware, "gpu_memory_bytes", lambda device: 80 * 2**30)
    assert tokens_at_once(gpu, model) == 1 << 16
    monkeypatch.setattr(hardware, "gpu_memory_bytes", lambda device: 8 * 2**30)
    assert 8 * 1024 < tokens_at_once(gpu, model) < 16 * 1024


def test_a_process_alone_is_a_world_of_one():
    with init_distributed("cpu") as world:
        assert world == World()
        assert world.is_main
        assert (world.sum(2.5), world.all_reduce_max(3)) == (2.5, 3)
        assert world.broadcast_from_main(lambda: "x") == "x"


def test_the_command_line_under_torchrun(picogpt, tmp_path, corpus):
    assert picogpt("tokenize", "char", "--text", corpus, "--run", "t").status == 0
    train = ["train", "char-bigram", "--steps", "4", "--device", "cpu", "--set", "model.block_size=16"]
    line = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "picogpt", *train]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "weights/char_bigram").glob("[0-9]*"))) == 1  # all ranks agree on a name
    assert done.stdout.count("best.pt: validation loss") == 1
