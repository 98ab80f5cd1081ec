"""The training ladder on a small model: every rung trains the same, and nothing is recorded that was not measured."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
import yaml
from conftest import gpt2_config

from picogpt import hardware, machines, records
from picogpt.bench import ladder
from picogpt.data.corpus import open_data
from picogpt.errors import PicogptError
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
MODEL = ["--set=model.n_layer=1", "--set=model.n_head=2", "--set=model.n_embd=16"]
BENCH = ["bench", "train", "--out=record.json", *MODEL]


def measure(rung: str, tokens, machine: machines.MachineConfig | None = None, **model: object) -> dict:
    machine = machine or machines.MachineConfig(**MACHINE)
    return ladder.measure("box", machine, rung, gpt2_config(**model), tokens, World())


def machine_file(path: Path, **settings: object) -> Path:
    path.write_text(yaml.safe_dump({**MACHINE, **settings}))
    return path


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return machine_file(tmp_path / "box.yaml")


@pytest.fixture(scope="module")
def climbed(tokens) -> dict[str, dict]:
    """The records of all rungs; without torch.compile, which has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNGS, "compile", Rung("", {}))
        patch.setattr(hardware, "multiplies_bfloat16", lambda device_type: True)
        by_kind = {records.key(record): record for record in (measure(rung, tokens) for rung in MACHINE["rungs"])}
    compare_with_baselines(by_kind)
    return {record["config"]["rung"]: record for record in by_kind.values()}


def test_every_rung_trains_the_same(climbed):
    assert list(climbed) == MACHINE["rungs"]
    for rung, record in climbed.items():
        results = record["results"]
        assert len(results["losses"]) == 4, rung
        assert abs(results["loss_difference"]) < LOSS_TOLERANCE / 5, rung
        assert results["final_loss"] < results["losses"][0], rung
    assert climbed["bf16"]["results"]["losses"] == climbed["compile"]["results"]["losses"]


def test_a_record_has_every_step_and_what_ran(climbed, tmp_path):
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
    assert "flash" in attention["flash"].lower()
    assert "BlockedAttention" in attention["best_attention"]
    assert climbed["baseline"]["setup"] == {
        "bfloat16": False, "tf32": False, "compile": None, "attention": "written_out", "loss": "plain",
        "residual": "float32", "fused_optimizer": False, "keep_memory": False,
    }  # fmt: skip
    best = climbed["kept_memory"]
    assert (best["setup"]["attention"], best["setup"]["keep_memory"]) == ("fastest", True)
    trains = [climbed[rung]["config"]["train"] for rung in ("baseline", "bf16", "kept_memory")]
    assert [train["batch_size"] for train in trains] == [4, 4, 4]
    assert [train["dtype"] for train in trains] == ["float32", "bfloat16", "bfloat16"]
    assert [train["weight_decay"] for train in trains] == [0.0, 0.0, 0.1]
    assert best["config"]["model"]["block_size"] == 16


def test_a_rung_that_the_device_lacks_is_recorded_as_that(monkeypatch, tokens):
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device_type: False)
    record = measure("bf16", tokens)
    assert "no instructions for bfloat16" in record["not_measured"]
    assert record["results"] == {}
    switches = ladder.switches_of(machines.MachineConfig(**MACHINE), "kept_memory", hardware.select("cpu"))
    assert (switches.bfloat16, switches.fused_optimizer) == (False, True)


@pytest.mark.parametrize(("fits", "expected"), [(2, 2), (1, 1), (0, None)])
def test_where_memory_runs_out_the_largest_micro_batch_that_fits_is_recorded(monkeypatch, tokens, fits, expected):
    forward = GPT2.forward

    def hungry(self, idx, *rest, **named):
        if len(idx) > fits:
            raise torch.OutOfMemoryError(f"tried to allocate memory for {len(idx)} sequences")
        return forward(self, idx, *rest, **named)

    monkeypatch.setattr(GPT2, "forward", hungry)
    record = measure("baseline", tokens)
    if expected is None:
        assert record["not_measured"].startswith("out of memory with one sequence: tried to allocate")
    else:
        assert (record["results"]["micro_batch_size"], record["results"]["out_of_memory"]) == (expected, True)


@pytest.mark.parametrize("works", [True, False])
def test_the_rung_of_torch_compile(tokens, works: bool):
    broken = {"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True}
    with torch._inductor.config.patch({} if works else broken):
        record = measure("compile", tokens)
        if works:
            assert record["results"]["compile_seconds"] > 0
        else:
            assert record["not_measured"].startswith("torch.compile does not work here")
            assert measure("flash", tokens)["setup"]["compile"] is None  # goes on without it, and says so


def test_every_layer_is_compiled_also_where_attention_is_not(monkeypatch, tokens):
    """Ten layers: for eight programs of the same lines torch makes no more."""
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device_type: True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        record = measure("best_attention", tokens, n_layer=10)
    assert record["setup"]["compile"] == "default"
    assert "BlockedAttention" in record["results"]["attention"]


def test_the_command_measures_what_it_can_and_refuses_the_rest(picogpt, box: Path, gpt2_folder: Path, tmp_path: Path):
    command = [*BENCH, "--data", gpt2_folder]
    for arguments, message in (
        (["--hardware", "a30", "--rung", "baseline"], "hardware a30 is A30"),
        (["--hardware", "a30", "--rung", "baseline"], hardware.cpu_name()),
        (["--hardware", "h10", "--rung", "baseline"], "did you mean h100?"),
        (["--hardware", "cpu", "--rung", "tf32"], "hardware cpu has no rung 'tf32'; it has baseline, bf16"),
    ):
        run = picogpt(*command, *arguments)
        assert (run.status, message in run.err) == (2, True), run.err
    assert not (tmp_path / "record.json").exists()
    assert picogpt(*command, "--hardware", box, "--rung", "baseline").status == 0
    assert records.read(tmp_path / "record.json")["config"]["rung"] == "baseline"
    assert "--hardware cpu --rung baseline" in picogpt("bench", "train", "--help").out


def test_a_long_training_on_another_device_is_refused(picogpt, gpt2_folder: Path, tmp_path: Path):
    machine_file(tmp_path / "gpu.yaml", kind="cuda")
    train = ["train", "gpt2", "--hardware", "gpu.yaml", "--run", "a", "--data", gpt2_folder, "--steps=2", *MODEL]
    run = picogpt(*train)
    assert (run.status, "hardware gpu.yaml is box (cuda, .*), and this device is" in run.err) == (2, True), run.err
    assert not list(tmp_path.glob("weights/gpt2/a/*/record.json"))


def test_two_ranks_climb_together(gpt2_folder: Path, tmp_path: Path):
    machine_file(tmp_path / "pair.yaml", ranks=2, micro_batch_size=1, rungs=["baseline", "fused_loss"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "picogpt"]
    command = [*torchrun, *BENCH, "--hardware=pair.yaml", "--rung=fused_loss", f"--data={gpt2_folder}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    record = records.read(tmp_path / "record.json")
    assert record["ranks"] == 2
    machine = machines.MachineConfig(**{**MACHINE, "rungs": ["baseline", "fused_loss"]})
    alone = measure("fused_loss", open_data(gpt2_folder), machine)
    assert record["results"]["losses"] == pytest.approx(alone["results"]["losses"], abs=1e-4)


def test_a_killed_benchmark_leaves_no_record(gpt2_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine_file(tmp_path / "slow.yaml", steps=100_000)
    with pytest.raises(subprocess.TimeoutExpired):  # which kills it
        forked.run("picogpt", *BENCH, "--hardware=slow.yaml", "--rung=baseline", f"--data={gpt2_folder}", timeout=4)
    assert [path.name for path in tmp_path.iterdir()] == ["slow.yaml"]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into figures."""
    from matplotlib.text import Text

    texts: list[str] = []
    draw = Text.draw

    def note(self, *rest, **named):
        texts.append(self.get_text())
        return draw(self, *rest, **named)

    monkeypatch.setattr(Text, "draw", note)
    return texts


def files_of(folder: Path, climbed: dict, *rungs: str, change: Callable[[dict], object] | None = None) -> list[Path]:
    """Files of the records of these rungs, the last of them changed."""
    copies = [copy.deepcopy(climbed[rung]) for rung in rungs]
    if change:
        change(copies[-1])
    for rung, record in zip(rungs, copies, strict=True):
        records.write(folder / f"{rung}.json", record)
    return [folder / f"{rung}.json" for rung in rungs]


def test_the_figure_says_what_is_measured_and_what_is_published(written, climbed, box: Path, tmp_path: Path):
    files = files_of(tmp_path, climbed, *climbed)
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


def reference_files(folder: Path, climbed: dict[str, dict], **rungs: str) -> list[Path]:
    """Reference records of an imagined A30: its rungs, and the rungs here that they are copied from."""
    from picogpt.reference import write_sums

    folder.mkdir(parents=True)
    for rung, source in rungs.items():
        record = copy.deepcopy(climbed[source]) | {"machine": "a30", "rung": rung}
        record |= {"commit": "0" * 40, "dirty": False, "corpus": {}}
        record["device"] |= {"name": f"NVIDIA A30 in {folder.name}", "kind": "cuda", "driver": "570.1"}
        records.write(folder / f"ladder_a30_{rung}.json", record)
    write_sums(folder)
    return sorted(folder.glob("ladder_*.json"))


def test_reference_records_are_drawn_as_such(written, climbed, tmp_path: Path):
    files = reference_files(tmp_path / "reference/here", climbed, baseline="baseline", bf16="bf16")
    draw_throughput("a30", [], files, tmp_path / "a30.png")
    assert any("reference records, not measured in this run" in text for text in written)
    assert any("on A30: B=4, T=16" in text for text in written)  # as measured, and not as the file of an A30 says
    assert any("NVIDIA A30 in here, driver 570.1" in text for text in written)


def test_a_ladder_never_gets_a_rung_from_another_machine(climbed, tmp_path: Path):
    files = reference_files(tmp_path / "reference/here", climbed, baseline="baseline", bf16="bf16")
    files += reference_files(tmp_path / "reference/there", climbed, tf32="flash")
    assert set(read_references(files)) == {records.Key("ladder", "gpt2", "a30", rung) for rung in ("baseline", "bf16")}


def test_a_rung_whose_loss_is_another_is_told(written, climbed, box: Path, tmp_path: Path):
    def worsen(record: dict) -> None:
        record["results"]["final_loss"] += 0.2

    files = files_of(tmp_path, climbed, "baseline", "flash", change=worsen)
    draw_throughput(str(box), files, [], tmp_path / "box.png")
    assert any("at most 0.2 nats, NOT all within" in text for text in written)


def test_where_nothing_is_compared_no_difference_is_told(climbed):
    flash = copy.deepcopy(climbed["flash"])
    flash["results"]["loss_difference"] = None  # as without a baseline
    for rungs in ({"flash": flash}, {}):
        assert report_ladder.Ladder("cpu", machines.load("cpu"), rungs, here=True).largest_difference is None


def test_rungs_without_a_baseline_are_not_compared(written, climbed, box: Path, tmp_path: Path):
    draw_throughput(str(box), files_of(tmp_path, climbed, "flash"), [], tmp_path / "box.png")
    assert "The baseline was not measured, so there are no speed-ups." in written
    assert "records without a baseline" in written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["device"].update(name="X"), "device.name X, and its baseline with"),
        (lambda record: record["config"]["hardware"].update(batch_size=8), "hardware.batch_size 8, and .* with 4"),
    ],
)
def test_rungs_of_another_device_or_other_settings_are_refused(climbed, box, tmp_path, change, message: str):
    files = files_of(tmp_path, climbed, "baseline", "flash", change=change)
    with pytest.raises(PicogptError, match=f"ladder box flash was measured with .*{message}"):
        draw_throughput(str(box), files, [], tmp_path / "box.png")
