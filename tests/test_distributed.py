"""Several ranks, started by the real torchrun, over gloo on this machine's CPUs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

from picogpt import checkpoint, hardware
from picogpt.config import Experiment
from picogpt.data.tokens import TokenData
from picogpt.errors import UsageError
from picogpt.train.distributed import World, init_distributed
from picogpt.train.step import micro_batch_size, tokens_at_once

TESTS = Path(__file__).resolve().parent
MODEL = {"kind": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
TRAIN = {
    "dtype": "float32",
    "steps": 20,
    "batch_size": 8,
    "learning_rate": 0.01,
    # The gradient of a key's bias is zero but for rounding, which AdamW would blow up to full steps.
    "eps": 1e-6,
    "grad_clip": 1.0,
    "weight_decay": 0.1,
    "warmup_steps": 4,
    "eval_interval": 5,
}


def command(folder: Path, tokens: Path, ranks: int, misfortune: str = "none", restarts: int = 0, **train) -> list[str]:
    settings = json.dumps({"model": MODEL, "train": {**TRAIN, **train}})
    script = [str(TESTS / "rank.py"), str(folder), str(tokens), settings, misfortune]
    if ranks == 1:
        return [sys.executable, *script]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", *torchrun, *script]


def run(*arguments, timeout: int = 120, **keywords) -> subprocess.CompletedProcess:
    line = command(*arguments, **keywords)
    if "torch.distributed.run" not in line:
        return forked.run("rank", *line[2:], timeout=timeout)
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=os.environ)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(folder / "best.pt").state


def results(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())["results"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokens_folder: Path) -> Path:
    """A run of one rank that accumulates over four micro-batches."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = run(folder, tokens_folder, 1, micro_batch_size=2)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(folder: Path, alone: Path) -> None:
    """Within float32's rounding of sums in another order."""
    ours, expected = weights(folder), weights(alone)
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name
    assert results(folder)["val_loss_after"] == pytest.approx(results(alone)["val_loss_after"], abs=1e-5)
    ours_rows, expected_rows = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (folder, alone)
    )
    assert [row["step"] for row in ours_rows] == [row["step"] for row in expected_rows]
    for ours_row, expected_row in zip(ours_rows, expected_rows, strict=True):
        for key in ("train_loss", "val_loss"):
            if key in expected_row:
                assert ours_row[key] == pytest.approx(expected_row[key], abs=1e-5)


def test_two_ranks_equal_one_with_accumulation(alone: Path, tokens_folder: Path, tmp_path: Path):
    done = run(tmp_path, tokens_folder, 2, "count", micro_batch_size=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exchanges").read_text() == "20"  # once a step, though each has two micro-batches
    assert_same(tmp_path, alone)
    assert json.loads((tmp_path / "record.json").read_text())["ranks"] == 2
    assert done.stderr.count("before training") == 1  # one rank speaks


@pytest.mark.parametrize(("before", "after", "everyone"), [(2, 1, False), (2, 1, True), (1, 2, False)])
def test_a_stopped_run_goes_on_with_any_number_of_ranks(
    alone: Path, tokens_folder: Path, tmp_path: Path, before: int, after: int, everyone: bool
):
    # Settings must be the same in both parts, so each rank takes what suits it.
    started = subprocess.Popen(
        command(tmp_path, tokens_folder, before, "linger"), stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(before)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if everyone:  # as SLURM does; torchrun sends the same to its ranks once more
        for rank in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
            os.kill(int(rank), signal.SIGTERM)
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=60)
    assert started.returncode != 0
    assert errors.count("picogpt: stopped by SIGTERM at step") == 1, errors
    state, _ = checkpoint.load_state(tmp_path / "checkpoints/last.pt")
    assert 5 < state["progress"]["step"] < 20
    done = run(tmp_path, tokens_folder, after)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)
    assert results(tmp_path)["sessions"] == 2


@pytest.mark.parametrize("misfortune", ["die:12", "die0:12"])
def test_a_dead_rank_ends_the_job_with_one_message(tokens_folder: Path, tmp_path: Path, misfortune: str):
    done = run(tmp_path, tokens_folder, 2, misfortune)
    assert done.returncode == 1
    assert done.stderr.count("picogpt: another rank of this job has ended") == 1, done.stderr
    assert "Traceback" not in done.stderr.split("picogpt: another")[0]
    assert checkpoint.load_state(tmp_path / "checkpoints/last.pt")[0]["progress"]["step"] == 7


def test_a_dead_rank_is_replaced_and_the_run_goes_on(alone: Path, tokens_folder: Path, tmp_path: Path):
    done = run(tmp_path, tokens_folder, 2, "die:12", restarts=1)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)
    assert results(tmp_path)["sessions"] == 2


def test_a_dead_rank_of_two_nodes_is_replaced_and_the_run_goes_on(alone: Path, tokens_folder: Path, tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one_node = command(tmp_path, tokens_folder, 2, "die:12", restarts=1)
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    line = [
        *one_node[:3],
        *nodes,
        *(word for word in one_node[3:] if word not in ("--standalone", "--nproc_per_node=2")),
    ]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "".join(errors)
    assert_same(tmp_path, alone)
    assert results(tmp_path)["sessions"] == 2


def test_where_nothing_can_be_compiled_the_ranks_go_on_without(
    alone: Path, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = run(tmp_path / "run", tokens_folder, 2, "compile", micro_batch_size=2)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stderr
    assert_same(tmp_path / "run", alone)


def test_a_loss_that_is_no_number_on_one_rank_stops_all_at_its_step(tokens_folder: Path, tmp_path: Path):
    done = run(tmp_path, tokens_folder, 2, "nan:9")
    assert done.returncode == 1
    assert done.stderr.count("picogpt: the loss is nan at step 10") == 1, done.stderr
    state, _ = checkpoint.load_state(tmp_path / "checkpoints/last.pt")
    assert state["progress"]["step"] == 7
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_batch_that_does_not_divide_says_what_would(tokens_folder: Path, tmp_path: Path):
    done = run(tmp_path, tokens_folder, 2, batch_size=7)
    assert done.returncode == 1  # torchrun's own status
    assert done.stderr.count("train.batch_size=7 does not divide over 2 ranks: with 2 ranks, 6 or 8 would") == 1
    assert "--nproc_per_node of 1, 7 would" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("batch", "ranks", "wanted", "most", "expected"),
    [
        (8, 1, None, 99, 8),
        (8, 2, None, 99, 4),
        (12, 1, None, 5, 4),
        (7, 1, None, 3, 1),
        (8, 2, 2, 99, 2),
        (8, 1, 8, 1, 8),
    ],
)
def test_micro_batches_fill_what_the_device_takes(batch: int, ranks: int, wanted: int | None, most: int, expected: int):
    assert micro_batch_size(batch, ranks, wanted, most) == expected


def test_a_small_gpu_takes_fewer_tokens_at_once(monkeypatch: pytest.MonkeyPatch):
    model = Experiment.model_validate({"model": {"kind": "gpt2"}, "train": {"steps": 1}}).model
    gpu = hardware.Device("a GPU", "cuda:0", "bfloat16")
    monkeypatch.setattr(hardware, "gpu_memory_bytes", lambda device: 80 * 2**30)
    assert tokens_at_once(gpu, model) == 1 << 16
    monkeypatch.setattr(hardware, "gpu_memory_bytes", lambda device: 8 * 2**30)
    assert 8 * 1024 < tokens_at_once(gpu, model) < 16 * 1024


def test_a_micro_batch_that_does_not_divide_says_what_would():
    with pytest.raises(UsageError, match=r"micro_batch_size=3 does not divide the 4 sequences .* these do: 1, 2, 4"):
        micro_batch_size(8, 2, 3, 99)
    with pytest.raises(UsageError, match=r"batch_size=1 does not divide over 4 ranks: with 4 ranks, 4 would"):
        micro_batch_size(1, 4, None, 99)


def test_a_process_alone_is_a_world_of_one():
    with init_distributed("cpu") as world:
        assert world == World()
        assert world.is_main
        assert (world.sum(2.5), world.all_reduce_max(3)) == (2.5, 3)
        assert world.broadcast_from_main(lambda: "x") == "x"


def test_the_command_line_under_torchrun(picogpt, tmp_path: Path, corpus: Path, tokens: TokenData):
    assert picogpt("tokenize", "char", "--text", corpus, "--run", "t").status == 0
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "picogpt", "train",
            "char-bigram", "--steps", "4", "--device", "cpu", "--set", "model.block_size=16",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "weights/char_bigram").glob("[0-9]*"))) == 1  # all ranks agree on a name
    assert done.stdout.count("best.pt: validation loss") == 1
