"""What `picogpt plan` tells a workflow before it lists its jobs."""

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_machines import gpus

from picogpt import plan
from picogpt.data import fetch
from picogpt.files import own_name, write_text

SHIPPED = yaml.safe_load((ROOT / "config/config.yaml").read_text())


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def make(**change: object) -> plan.Plan:
    return plan.make({**SHIPPED, **change}, "config.yaml")


def test_on_a_cpu(monkeypatch):
    gpus(monkeypatch)
    made = make()
    assert (made.text, made.corpus) == ("resources/corpus.txt", "tinyshakespeare")
    assert (made.detected, made.streams) == (["gpus", "ladder: hardware"], [16])
    assert list(made.models) == ["char_bigram", "char_transformer", "gpt2"]
    assert all(model.file == [] for model in made.models.values())  # the shipped settings
    assert json.loads(made.models["gpt2"].settings).keys() == {"model", "train"}  # how it runs decides no result
    assert made.gpt2.launch == "picogpt"
    resources = made.resources
    assert (resources["gpu"], resources["gpu_model"], resources["cpus_per_task"]) == (0, None, 8)
    assert made.measured_rungs == [f"ladder/cpu/{rung}" for rung in made.machines["cpu"].ladder]
    assert (made.long_trainings, made.from_hub, made.hub_attempt) == ([], ["pretrained"], 1)


def test_on_a_cluster_every_machine_asks_for_its_own(monkeypatch):
    gpus(monkeypatch)  # the machine that submits
    models = {"h100x16": "hopper", "default": "any"}
    made = make(gpus=4, gpu_model=models, ladder={"hardware": ["h100x2", "h100x16", "cpu"]})
    assert (made.detected, made.fast_dtype, made.streams) == ([], "bfloat16", [16, 64, 256])
    assert make(gpus=4, gpt2={"throughput_streams": [8]}).streams == [8]
    requested = made.gpt2.resources
    assert (requested["gpu"], requested["gpu_model"], requested["cpus_per_task"]) == (4, "any", 32)
    assert made.gpt2.launch.startswith("torchrun --nproc_per_node=4 ")
    assert made.gpt2.launch.endswith(" --standalone -m picogpt")
    two, sixteen, cpu = (made.machines[name] for name in ("h100x2", "h100x16", "cpu"))
    assert two.resources == {
        "nodes": 1, "gpu": 2, "gpu_model": None, "tasks": None, "tasks_per_gpu": 0, "mpi": None, "cpus_per_task": 16,
    }  # fmt: skip
    assert sixteen.resources == {
        "nodes": 2, "gpu": 16, "gpu_model": "hopper", "tasks": 2, "tasks_per_gpu": 0, "mpi": "srun", "cpus_per_task": 64,
    }  # fmt: skip
    assert sixteen.launch.startswith("srun ")
    assert "torchrun --nproc_per_node=8 " in sixteen.launch
    assert (cpu.resources["gpu"], cpu.training, two.training.file) == (0, None, ["--config=gpt2_fineweb"])
    assert made.long_trainings == ["h100x2", "h100x16"]
    assert (made.from_hub, made.hellaswag) == (["pretrained", "fineweb-edu/0", "hellaswag"], True)
    manifest = Path("weights/gpt2_tokenizer/pipeline/fineweb-edu/manifest.json")
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert make(ladder={"hardware": ["h100x2"]}).from_hub == ["pretrained"]  # its text is here
    for asked, gpus_asked, wanted in ((True, 0, True), (False, 4, False), ("auto", 0, False)):
        made = make(gpus=gpus_asked, gpt2={"hellaswag": asked, "pretrained": False})
        assert (made.hellaswag, made.from_hub) == (wanted, ["hellaswag"] if wanted else [])


def test_a_rung_depends_on_those_before_it_and_not_on_the_title():
    ladder = make().machines["a30"].ladder
    assert list(ladder)[:3] == ["baseline", "tf32", "bf16"]
    assert (ladder["baseline"].before, ladder["bf16"].before) == ([], ["tf32"])
    settings = json.loads(ladder["tf32"].settings)
    assert (settings["rungs"], "title" in settings) == (["baseline", "tf32"], False)


@pytest.mark.parametrize(("here", "ranks"), [(1, 1), (2, 2), (3, 2), (6, 4)])
def test_as_many_gpus_train_as_divide_the_batch(monkeypatch, here: int, ranks: int):
    gpus(monkeypatch, *["NVIDIA L40S"] * here)
    monkeypatch.setattr(plan, "_fast_dtype", lambda gpus, here: "bfloat16")
    assert make().gpt2.ranks == ranks
    assert make(gpt2={"set": ["train.batch_size=1"]}).gpt2.ranks == 1


@pytest.mark.parametrize(
    ("corpus", "text", "name"),
    [
        ("tinyshakespeare", "resources/corpus.txt", "tinyshakespeare"),
        (["gutenberg-shakespeare", "tinyshakespeare"], "resources/corpus.txt", "gutenberg-shakespeare"),
        ("my text.txt", "my text.txt", own_name("my text")),
    ],
)
def test_the_text_is_a_registered_one_or_the_users_own(tmp_path: Path, corpus, text: str, name: str):
    (tmp_path / "my text.txt").write_text("words")
    made = make(corpus=corpus)
    assert (made.text, made.corpus) == (text, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "nothere.txt"}, "there is no text nothere.txt"),
        ({"ladder": {"hardware": ["h10"]}}, "no hardware 'h10'"),
        ({"gpt2": {"config": "mine.yaml"}}, "cannot read mine.yaml"),
        ({"char_bigram": {"config": "mine"}}, "no settings called mine"),
        ({"gpt2": None}, "gpt2=null: input should be a valid dictionary"),
        ({"gpt2": {"set": ["train.batch_size=x"]}}, 'train.batch_size="x": input should be a valid integer'),
        ({"gpt2": {"set": ["train=[1]"]}}, "train=[1]: input should be a valid dictionary"),
        ({"gpus": 3}, "gpus: 3 must divide train.batch_size of gpt2, which is 4: use 1, 2, or change"),
        ({"gpus": 10**9}, "gpus: 1000000000 must divide train.batch_size of gpt2, which is 4"),
        ({"corpus": []}, "corpus=[]: list should have at least 1 item"),
        ({"corpus": ""}, 'corpus="": string should have at least 1 character'),
        ({"run": "../../x"}, 'run="../../x": string should match pattern'),
        ({"gpus": -1}, "gpus=-1: input should be greater than or equal to 0"),
        ({"gpus": True}, "gpus=true: input should be a valid integer"),
        ("corpus: [", "the configuration is not YAML"),
        ("- 1", "the configuration must hold a mapping"),
        ("", "a mapping"),
    ],
)
def test_what_cannot_be_planned_is_one_message(picogpt, monkeypatch, change: dict | str, message: str):
    gpus(monkeypatch)
    text = change if isinstance(change, str) else json.dumps({**SHIPPED, **change})
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    run = picogpt("plan", "-")
    assert (run.status, run.out, message in run.err) == (1 if "cannot read" in message else 2, "", True), run.err


def test_by_hand_it_reads_a_file(picogpt):
    Path("mine.yaml").write_text(yaml.safe_dump(SHIPPED))
    assert json.loads(picogpt("plan", "mine.yaml").out).keys() == plan.Plan.model_fields.keys()


def test_the_estimate_lists_every_part_and_what_is_done(picogpt, tmp_path: Path):
    small = {"set": ["model.n_layer=1", "model.n_head=1", "model.n_embd=8", "model.block_size=16"]}
    settings = {**SHIPPED, "gpt2": {**SHIPPED["gpt2"], **small}, "ladder": {"hardware": ["cpu"]}}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    write_text("weights/char_bigram/pipeline/record.json", "{}")
    rows = [re.split("  +", line) for line in picogpt("plan", "--estimate", "mine.yaml").out.splitlines()]
    times = {part: about for part, *_, about in rows}
    assert list(times) == [
        "part", "training of char-bigram", "training of char-transformer", "training of gpt2", "loss of GPT-2",
        "sampling speed of GPT-2", "sampling many streams", "OpenAI's GPT-2", "training ladder of CPU", "all of it",
    ]  # fmt: skip
    assert times.pop("part") == "about"
    assert times.pop("training of char-bigram") == "done"
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", about) for about in times.values())
    assert max(times, key=lambda part: times[part]) in ("all of it", "training of char-transformer")
    settings["gpt2"]["hellaswag"] = True
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert "HellaSwag  " in picogpt("plan", "--estimate", "mine.yaml").out


def status(attempt: int, endpoint: str, **files: fetch.Answer) -> None:
    write_text("resources/hub.json", fetch.HubStatus(attempt=attempt, endpoint=endpoint, files=files).model_dump_json())


def test_the_hub_is_asked_again_until_its_answer_is_settled(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub")
    weights = tmp_path / "weights"
    here = fetch.Answer(state="here", path=str(weights))
    status(3, "http://hub", pretrained=fetch.Answer(state="unreachable", reason="nobody answered"))
    assert make().hub_attempt == 4
    status(4, "http://hub", pretrained=here)
    assert make().hub_attempt == 5  # the cache was emptied
    weights.touch()
    assert make().hub_attempt == 4
    status(5, "http://hub", pretrained=fetch.Answer(state="refused", reason="no login"))
    assert make().hub_attempt == 5
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    assert make().hub_attempt == 6
    # A machine with a long training asks for more than was asked for.
    status(6, "http://mirror", pretrained=here)
    assert make().hub_attempt == 6
    assert make(ladder={"hardware": ["h100x2"]}).hub_attempt == 7


def test_a_status_that_is_none_is_named(picogpt):
    Path("resources").mkdir()
    Path("resources/hub.json").write_text('{"attempt": 0, "endpoint": "", "files": {}}')
    Path("mine.yaml").write_text(yaml.safe_dump(SHIPPED))
    run = picogpt("plan", "mine.yaml")
    assert (run.status, "resources/hub.json does not say what the hub gave: delete it" in run.err) == (1, True)
