import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import gpt2_config, small_experiment

from picogpt import models
from picogpt.checkpoint import load_state, load_weights, save_state, save_weights
from picogpt.config import Experiment
from picogpt.errors import PicogptError


@pytest.fixture
def best(tmp_path: Path) -> Path:
    experiment = small_experiment()
    model = models.build(experiment.model, 20, 1)
    save_weights(tmp_path / "best.pt", model.state_dict(), experiment, 20, {"tokenizer_sha256": "0"}, 30, 1.5)
    return tmp_path / "best.pt"


def change(best: Path, edit: Callable[[dict], object]) -> None:
    tree = torch.load(best, weights_only=True)
    edit(tree)
    torch.save(tree, best)


def test_weights_come_back_as_they_were(best: Path):
    weights = load_weights(best, "char-transformer")
    assert (weights.step, weights.val_loss, weights.vocab_size) == (30, 1.5, 20)
    assert weights.experiment == small_experiment()
    fresh = models.build(small_experiment().model, 20, 1).state_dict()
    for name, tensor in weights.model().state_dict().items():
        assert torch.equal(tensor, fresh[name])


def test_untrained_means_the_weights_of_the_seed(best: Path):
    change(best, lambda tree: tree["model"]["head.weight"].fill_(7))
    assert load_weights(best).model().head.weight.max() == 7
    untrained = load_weights(best).model(untrained=True).state_dict()
    expected = models.build(small_experiment().model, 20, small_experiment().train.seed).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in untrained.items())


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"model": Attack()}, tmp_path / "zip.pt")
    with pytest.raises(PicogptError, match=r"zip\.pt .*could be code: it is refused"):
        load_weights(tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(PicogptError, match=r"plain\.pt is incomplete, or not a checkpoint"):
        load_weights(tmp_path / "plain.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "incomplete, or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "incomplete, or not a checkpoint"),
        (lambda path: path.write_text("not weights"), "incomplete, or not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:200] + b"\0" * 600 + path.read_bytes()[800:]), "damaged"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: torch.save({"model": {}}, path), "not a checkpoint of picogpt"),
        (lambda path: torch.save([1], path), "not a checkpoint of picogpt"),
        (lambda path: change(path, lambda tree: tree.update(version=9)), "has version 9; this picogpt reads version 1"),
        (lambda path: change(path, lambda tree: tree["experiment"]["model"].update(n_head=5)), "n_head"),
        (lambda path: change(path, lambda tree: tree.pop("vocab_size")), "vocab_size"),
    ],
    ids=["cut", "empty", "text", "damaged", "missing", "foreign", "list", "version", "settings", "incomplete"],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(best: Path, damage, message: str):
    damage(best)
    with pytest.raises(PicogptError, match=message) as error:
        load_weights(best)
    assert str(best) in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("head.weight"), "head.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda state: state.update({"head.weight": torch.zeros(3, 3)}), r"has shape \(3, 3\), not \(20, 16\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_that_do_not_fit_are_named(best: Path, edit, message: str):
    change(best, lambda tree: edit(tree["model"]))
    with pytest.raises(PicogptError, match=f"best.pt does not fit the model: .*{message}"):
        load_weights(best).model()


def test_a_file_is_refused_in_place_of_one_with_another_content(best: Path, tmp_path: Path):
    with pytest.raises(PicogptError, match="holds a char-transformer, not a char-bigram"):
        load_weights(best, "char-bigram")
    save_state(tmp_path / "last.pt", state_of(0))
    with pytest.raises(PicogptError, match=r"holds the state of a training \(last.pt\); weights only \(best.pt\) is"):
        load_weights(tmp_path / "last.pt")
    with pytest.raises(PicogptError, match=r"holds weights only \(best.pt\)"):
        load_state(best)


def state_of(step: int) -> dict:
    return {"fingerprint": "", "progress": {"step": step}, "model": {}, "optimizer": []}


def test_the_state_before_the_last_is_kept(tmp_path: Path):
    for step in range(3):
        save_state(tmp_path / "last.pt", state_of(step))
    assert load_state(tmp_path / "last.pt")[0]["progress"] == {"step": 2}
    (tmp_path / "last.pt").write_bytes(b"torn")
    state, warning = load_state(tmp_path / "last.pt")
    assert state["progress"] == {"step": 1}
    assert "last.pt" in warning
    (tmp_path / "last.previous.pt").write_bytes(b"torn too")
    with pytest.raises(PicogptError, match=r"last\.previous\.pt"):
        load_state(tmp_path / "last.pt")


def test_gpt2_is_loaded_with_the_tokenizer_in_resources(gpt2, gpt2_resources: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resources").symlink_to(gpt2_resources)
    experiment = Experiment(model=gpt2_config(), train={"steps": 1})
    built = models.build(experiment.model, gpt2.vocab_size, 0)
    save_weights(
        tmp_path / "best.pt", built.state_dict(), experiment, gpt2.vocab_size, {"tokenizer_sha256": gpt2.sha256}, 1, 1.0
    )
    model, tokenizer = models.load("best.pt")
    assert torch.equal(model.wte.weight, built.wte.weight)
    assert tokenizer.encode("the king").tolist() == gpt2.encode("the king").tolist()
    change(tmp_path / "best.pt", lambda tree: tree["corpus"].update(tokenizer_sha256="0"))
    with pytest.raises(PicogptError, match=r"best\.pt was trained with another tokenizer than GPT-2's"):
        models.load("best.pt")
