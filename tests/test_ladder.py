"""The training ladder on a small model: every rung trains the same, and nothing is recorded that was not measured."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from picogpt import hardware, machines, models, records
from picogpt.bench import ladder
from picogpt.config import GPT2Config
from picogpt.data.corpus import tokenize_gpt2
from picogpt.data.tokens import TokenData
from picogpt.errors import PicogptError
from picogpt.models import kernels
from picogpt.models.gpt2 import GPT2
from picogpt.registry import RUNGS, Rung
from picogpt.report import ladder as report_ladder
from picogpt.report.compare import read_references
from picogpt.report.ladder import LOSS_TOLERANCE, compare_with_baselines
from picogpt.report.throughput import draw_throughput
from picogpt.train.distributed import World

MACHINE = {
    "title": "box", "device": ".*", "kind": "cpu", "batch_size": 4, "micro_batch_size": 4, "block_size": 16,
    "warmup_steps": 1, "steps": 3,
    "rungs": ["baseline", "bf16", "compile", "flash", "padded_vocab", "fused_adamw", "fused_loss", "best_attention", "kept_memory"],
}  # fmt: skip
MODEL = ("model.n_layer=1", "model.n_head=2", "model.n_embd=16")


@pytest.fixture(scope="module")
def gpt2_tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path, gpt2) -> TokenData:
    return tokenize_gpt2([corpus], tmp_path_factory.mktemp("gpt2_tokens"), gpt2)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    path = tmp_path / "box.yaml"
    path.write_text(yaml.safe_dump(MACHINE))
    return path


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory, tokens: TokenData) -> dict[str, dict]:
    """The records of all rungs; without torch.compile, which has a test of its own."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "box.yaml").write_text(yaml.safe_dump(MACHINE))
    machine = machines.load(str(folder / "box.yaml"))
    config = GPT2Config(kind="gpt2", n_layer=1, n_head=2, n_embd=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNGS, "compile", Rung("", {}))
        patch.setattr(hardware, "multiplies_bfloat16", lambda device_type: True)
        by_kind = {}
        for rung in machine.rungs:
            record = ladder.measure("box", machine, rung, config, tokens, World())
            by_kind[records.key(record)] = record
    compare_with_baselines(by_kind)
    return {record["config"]["rung"]: record for record in by_kind.values()}


def test_every_rung_trains_the_same(climbed: dict[str, dict]):
    assert list(climbed) == MACHINE["rungs"]
    for rung, record in climbed.items():
        results = record["results"]
        assert len(results["losses"]) == 4, rung
        assert abs(results["loss_difference"]) < LOSS_TOLERANCE / 5, rung
        assert results["final_loss"] < results["losses"][0], rung
    exact = [climbed[rung]["results"]["losses"] for rung in ("bf16", "compile")]
    assert exact[0] == exact[1]


def test_a_record_has_every_step_and_what_ran(climbed: dict[str, dict], tmp_path: Path):
    for rung, record in climbed.items():
        records.write(tmp_path / f"{rung}.json", record)
        results = record["results"]
        assert len(results["step_seconds"]) == 3
        assert results["fastest"] <= results["median"] <= results["slowest"]
        assert results["tokens_per_second"] == pytest.approx(4 * 16 / results["median"])
        assert results["kernels"]
        assert results["peak_memory_bytes"] > 0
        assert (results["mfu"], results["out_of_memory"], results["micro_batch_size"]) == (None, False, 4)
    attention = {rung: record["results"]["attention"] for rung, record in climbed.items()}
    assert attention["baseline"] is attention["compile"] is None
    assert "flash" in attention["flash"]
    assert "BlockedAttention" in attention["best_attention"]
    assert climbed["baseline"]["setup"] == {
        "bfloat16": False, "tf32": False, "compile": None, "attention": "written_out", "loss": "plain",
        "fused_optimizer": False, "keep_memory": False,
    }  # fmt: skip
    assert climbed["kept_memory"]["setup"]["attention"] == "fastest"


def test_attention_and_losses_of_the_ladder_are_those_of_the_model():
    config = GPT2Config(kind="gpt2", n_layer=2, n_head=2, n_embd=16, block_size=40)
    model = models.build(config, 70, seed=1)
    assert isinstance(model, GPT2)
    idx = torch.randint(70, (2, 40))
    expected = model(idx, idx)
    for loss, attention in itertools.product(kernels.LOSSES, kernels.ATTENTION):
        kernels.use(model, attention, loss)
        assert model(idx, idx).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_rung_that_the_device_lacks_is_recorded_as_that(monkeypatch, tokens: TokenData, box: Path):
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device_type: False)
    machine = machines.load(str(box))
    config = GPT2Config(kind="gpt2", n_layer=1, n_head=2, n_embd=16)
    record = ladder.measure("box", machine, "bf16", config, tokens, World())
    assert "no instructions for bfloat16" in record["not_measured"]
    assert record["results"] == {}
    device = hardware.select("cpu")
    assert not ladder.switches_of(machine, "kept_memory", device).bfloat16
    assert ladder.switches_of(machine, "kept_memory", device).fused_optimizer


@pytest.mark.parametrize(("fits", "expected"), [(2, 2), (1, 1), (0, None)])
def test_where_memory_runs_out_the_largest_micro_batch_that_fits_is_recorded(
    monkeypatch, tokens: TokenData, box: Path, fits: int, expected: int | None
):
    forward = GPT2.forward

    def hungry(self, idx, *rest, **named):
        if len(idx) > fits:
            raise torch.OutOfMemoryError(f"tried to allocate memory for {len(idx)} sequences")
        return forward(self, idx, *rest, **named)

    monkeypatch.setattr(GPT2, "forward", hungry)
    config = GPT2Config(kind="gpt2", n_layer=1, n_head=2, n_embd=16)
    record = ladder.measure("box", machines.load(str(box)), "baseline", config, tokens, World())
    if expected is None:
        assert record["not_measured"].startswith("out of memory with one sequence: tried to allocate")
    else:
        assert (record["results"]["micro_batch_size"], record["results"]["out_of_memory"]) == (expected, True)


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_the_rung_of_torch_compile(
    picogpt, monkeypatch, gpt2_tokens: TokenData, box: Path, tmp_path: Path, works: bool
):
    arguments = ["bench", "train", "--hardware", box, "--data", gpt2_tokens.train.path.parent, "--out", "record.json"]
    arguments += [f"--set={pair}" for pair in MODEL]
    broken = {"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True}
    with torch._inductor.config.patch({} if works else broken):
        assert picogpt(*arguments, "--rung", "compile").status == 0
        record = records.read(tmp_path / "record.json")
        if works:
            assert record["results"]["compile_seconds"] > 0
        else:
            assert record["not_measured"].startswith("torch.compile does not work here")
            assert picogpt(*arguments, "--rung", "flash").status == 0  # goes on without it, and says so
            assert records.read(tmp_path / "record.json")["setup"]["compile"] is None


@pytest.mark.slow
def test_every_layer_is_compiled_also_where_attention_is_not(monkeypatch, tokens: TokenData, box: Path):
    """Ten layers: for eight programs of the same lines torch makes no more."""
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device_type: True)
    config = GPT2Config(kind="gpt2", n_layer=10, n_head=2, n_embd=16)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        record = ladder.measure("box", machines.load(str(box)), "best_attention", config, tokens, World())
    assert record["setup"]["compile"] == "default"
    assert "BlockedAttention" in record["results"]["attention"]


def test_the_record_says_what_ran(climbed: dict[str, dict]):
    trains = {rung: climbed[rung]["config"]["train"] for rung in ("baseline", "bf16", "kept_memory")}
    assert {rung: train["batch_size"] for rung, train in trains.items()} == dict.fromkeys(trains, 4)
    assert [train["dtype"] for train in trains.values()] == ["float32", "bfloat16", "bfloat16"]
    assert [train["weight_decay"] for train in trains.values()] == [0.0, 0.0, 0.1]
    assert climbed["baseline"]["config"]["model"]["block_size"] == 16
    assert climbed["kept_memory"]["setup"]["keep_memory"]


def test_the_command_refuses_what_it_cannot_measure(picogpt, box: Path, gpt2_tokens: TokenData, tmp_path: Path):
    data = ["--data", gpt2_tokens.train.path.parent, "--out", "record.json"]
    for arguments, message in (
        (["--hardware", "a30", "--rung", "baseline"], "hardware a30 is A30"),
        (["--hardware", "h10", "--rung", "baseline"], "did you mean h100?"),
        (["--hardware", "cpu", "--rung", "tf32"], "hardware cpu has no rung 'tf32'; it has baseline, bf16"),
    ):
        run = picogpt("bench", "train", *arguments, *data)
        assert run.status == 2
        assert message in run.err
    assert hardware.cpu_name() in picogpt("bench", "train", "--hardware", "a30", "--rung", "baseline", *data).err
    assert not (tmp_path / "record.json").exists()


def test_a_long_training_on_another_device_is_refused(picogpt, gpt2_tokens: TokenData, tmp_path: Path):
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump({**MACHINE, "kind": "cuda"}))
    sets = [f"--set={pair}" for pair in (*MODEL, "train.steps=2")]
    run = picogpt(
        "train", "gpt2", "--hardware", "gpu.yaml", "--run", "a", "--data", gpt2_tokens.train.path.parent, *sets
    )
    assert (run.status, "hardware gpu.yaml is box (cuda, .*), and this device is" in run.err) == (2, True), run.err
    assert not list(tmp_path.glob("weights/gpt2/a/*/record.json"))


def test_two_ranks_climb_together(gpt2_tokens: TokenData, tmp_path: Path):
    command = ["--hardware", "pair.yaml", "--rung", "fused_loss", "--data", str(gpt2_tokens.train.path.parent)]
    command += [f"--set={pair}" for pair in MODEL]
    (tmp_path / "pair.yaml").write_text(
        yaml.safe_dump({**MACHINE, "ranks": 2, "micro_batch_size": 1, "rungs": ["baseline", "fused_loss"]})
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "picogpt"]
    run = subprocess.run(
        [*torchrun, "bench", "train", *command, "--out", "record.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    record = records.read(tmp_path / "record.json")
    assert record["ranks"] == 2
    config = GPT2Config(kind="gpt2", n_layer=1, n_head=2, n_embd=16)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**MACHINE, "rungs": ["baseline", "fused_loss"]}))
    alone = ladder.measure("one", machines.load(str(tmp_path / "one.yaml")), "fused_loss", config, gpt2_tokens, World())
    assert record["results"]["losses"] == pytest.approx(alone["results"]["losses"], abs=1e-4)


def test_a_killed_benchmark_leaves_no_record(gpt2_tokens: TokenData, tmp_path: Path):
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump({**MACHINE, "steps": 100_000}))
    command = ["--hardware", "slow.yaml", "--rung", "baseline", "--data", str(gpt2_tokens.train.path.parent)]
    command += [f"--set={pair}" for pair in MODEL]
    run = subprocess.Popen(
        [sys.executable, "-m", "picogpt", "bench", "train", *command, "--out", "record.json"], cwd=tmp_path
    )
    time.sleep(4)
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=20)
    assert [path.name for path in tmp_path.iterdir()] == ["slow.yaml"]


def texts_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into the next figures."""
    from matplotlib.text import Text

    written: list[str] = []
    draw = Text.draw

    def note(self, *rest, **named):
        written.append(self.get_text())
        return draw(self, *rest, **named)

    monkeypatch.setattr(Text, "draw", note)
    return written


def test_the_figure_says_what_is_measured_and_what_is_published(monkeypatch, climbed, box: Path, tmp_path: Path):
    files = []
    for rung, record in climbed.items():
        files.append(tmp_path / f"{rung}.json")
        records.write(files[-1], record)
    written = texts_of(monkeypatch)
    draw_throughput(str(box), files, [], tmp_path / "box.png")
    assert any("measured in this run" in text for text in written)
    assert any(hardware.cpu_name() in text for text in written)
    written.clear()
    draw_throughput("a30", files, [], tmp_path / "a30.png")  # records of another machine draw nothing here
    assert "Not measured in this run.\nThe diamonds are the published values." in written
    assert {"2.8x", "6x", "7.8x", "9.3x"} <= set(written)
    assert not any("bars: measured" in text or "tok/s" in text for text in written)
    written.clear()
    draw_throughput("h100", [], [], tmp_path / "h100.png")
    assert "Not measured in this run.\nNo numbers are published for this machine." in written
    for name in ("box", "a30", "h100"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def reference_folder(folder: Path, climbed: dict[str, dict], **change: object) -> list[Path]:
    """Reference records of an imagined A30."""
    from picogpt.reference import write_sums

    folder.mkdir(parents=True)
    files = []
    for rung in ("baseline", "bf16"):
        record = json.loads(json.dumps(climbed[rung])) | {"machine": "a30"} | change
        record["device"] = {**record["device"], "name": "NVIDIA A30", "kind": "cuda", "driver": "570.1"}
        record |= {"commit": "0" * 40, "dirty": False, "corpus": {}}
        files.append(folder / f"ladder_a30_{rung}.json")
        files[-1].write_text(json.dumps(record))
    write_sums(folder)
    return files


def test_reference_records_are_drawn_as_such(monkeypatch, climbed, tmp_path: Path):
    files = reference_folder(tmp_path / "reference/nvidia_a30", climbed)
    written = texts_of(monkeypatch)
    draw_throughput("a30", [], files, tmp_path / "a30.png")
    assert any("reference records, not measured in this run" in text for text in written)
    assert any("on A30: B=4, T=16" in text for text in written)  # as measured, and not as the file of an A30 says
    assert any("NVIDIA A30, driver 570.1" in text for text in written)


def test_a_rung_whose_loss_is_another_is_told(monkeypatch, climbed, box: Path, tmp_path: Path):
    files = []
    for rung in ("baseline", "flash"):
        record = json.loads(json.dumps(climbed[rung]))
        record["results"]["final_loss"] += 0.2 if rung == "flash" else 0
        files.append(tmp_path / f"{rung}.json")
        records.write(files[-1], record)
    written = texts_of(monkeypatch)
    draw_throughput(str(box), files, [], tmp_path / "box.png")
    assert any("at most 0.2 nats, NOT all within" in text for text in written)


def test_where_nothing_is_compared_no_difference_is_told(climbed):
    flash = json.loads(json.dumps(climbed["flash"]))
    flash["results"]["loss_difference"] = None  # as without a baseline
    for rungs in ({"flash": flash}, {}):
        assert report_ladder.Ladder("cpu", machines.load("cpu"), rungs, here=True).largest_difference is None


def test_a_ladder_never_gets_a_rung_from_another_machine(climbed, tmp_path: Path):
    first = reference_folder(tmp_path / "reference/nvidia_a30", climbed)
    (tmp_path / "reference/other").mkdir()
    from picogpt.reference import write_sums

    other = tmp_path / "reference/other/ladder_a30_tf32.json"
    clean = {"commit": "0" * 40, "dirty": False, "corpus": {}}
    other.write_text(json.dumps(climbed["flash"] | clean | {"machine": "a30", "rung": "tf32"}))
    write_sums(other.parent)
    assert set(read_references([*first, other])) == {
        records.Key("ladder", "gpt2", "a30", rung) for rung in ("baseline", "bf16")
    }


def test_rungs_of_another_device_or_without_a_baseline_are_not_compared(
    monkeypatch, climbed, box: Path, tmp_path: Path
):
    baseline, flash = (json.loads(json.dumps(climbed[rung])) for rung in ("baseline", "flash"))
    records.write(tmp_path / "flash.json", flash)
    written = texts_of(monkeypatch)
    draw_throughput(str(box), [tmp_path / "flash.json"], [], tmp_path / "box.png")
    assert "The baseline was not measured, so there are no speed-ups." in written
    assert "records without a baseline" in written
    baseline["device"]["name"] = "another CPU"
    records.write(tmp_path / "baseline.json", baseline)
    with pytest.raises(
        PicogptError, match=r"ladder box flash was measured with device.name .*, and its baseline with another CPU"
    ):
        draw_throughput(str(box), [tmp_path / "baseline.json", tmp_path / "flash.json"], [], tmp_path / "box.png")
    baseline["device"] = flash["device"]
    baseline["config"]["hardware"]["batch_size"] = 8
    records.write(tmp_path / "baseline.json", baseline)
    with pytest.raises(PicogptError, match=r"measured with config.hardware.batch_size 4, and .* with 8"):
        draw_throughput(str(box), [tmp_path / "baseline.json", tmp_path / "flash.json"], [], tmp_path / "box.png")


def test_the_command_line_says_which_rungs_there_are(picogpt):
    run = picogpt("bench", "train", "--help")
    assert "--hardware cpu --rung baseline" in run.out
