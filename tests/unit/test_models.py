import math

import pytest
import torch
from conftest import SMALL_RUNTIME

from picogpt import config, hardware, models
from picogpt.config import CharBigramConfig, CharTransformerConfig, TrainConfig
from picogpt.registry import MODELS, settings_class
from picogpt.train.loop import Trainer
from picogpt.train.optim import Optimizer, learning_rate_factor, orthogonalize

V = 11
BIGRAM = CharBigramConfig(kind="char-bigram", block_size=12)
TRANSFORMER = CharTransformerConfig(kind="char-transformer", n_layer=2, n_head=2, n_embd=16, block_size=12)


def disturbed(config: config.ModelConfig) -> models.LanguageModel:
    """A model in which every branch has something to say: the transformer starts as the identity."""
    model = models.build(config, V, seed=1).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=[BIGRAM, TRANSFORMER], ids=lambda config: config.kind)
def model(request: pytest.FixtureRequest) -> models.LanguageModel:
    return disturbed(request.param)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_registry_trains_with_its_defaults_where_it_has_no_file(name, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("PICOGPT_CONFIG", str(tmp_path))
    assert config.model_file(name) == name
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    small = [f"model.{key}={value}" for key, value in shape.items() if key in settings_class(name).model_fields]
    runtime = [f"runtime.{key}={value}" for key, value in SMALL_RUNTIME.items()]
    experiment = config.load_experiment(name, ["train.steps=1", *small, *runtime])
    assert experiment.train == TrainConfig(steps=1)
    results = Trainer(experiment, tokens, tmp_path / "run").run()["results"]
    assert (results["steps"], math.isfinite(results["val_loss_after"])) == (1, True)
    assert results["val_loss_after"] != results["val_loss_before"]


def test_the_seed_decides_the_weights_and_the_global_random_state_is_left_alone():
    tables = [models.build(BIGRAM, V, seed).embedding.weight for seed in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.build(TRANSFORMER, V, 1)
    assert torch.equal(torch.rand(1), expected)


def test_a_fresh_transformer_guesses_uniformly():
    idx = torch.randint(V, (2, 12))
    assert models.build(TRANSFORMER, V, 1)(idx, idx).item() == pytest.approx(math.log(V), abs=1e-6)


def test_the_loss_is_the_cross_entropy_of_the_logits(model):
    idx, targets = torch.randint(V, (2, 3, 12))
    expected = -model(idx).log_softmax(-1).gather(2, targets[..., None]).mean()
    assert model(idx, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_prediction_sees_the_future(model):
    idx = torch.randint(V, (1, 12))
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % V
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def test_every_earlier_character_matters_to_the_transformer():
    model = disturbed(TRANSFORMER)
    idx = torch.randint(V, (1, 12))
    for position in range(11):
        changed = idx.clone()
        changed[0, position] = (idx[0, position] + 1) % V
        assert not torch.allclose(model(changed)[0, -1], model(idx)[0, -1])


@pytest.mark.parametrize("prompt", [1, 5, 11])
def test_a_cache_changes_nothing(prompt: int):
    model, idx = disturbed(TRANSFORMER), torch.randint(V, (3, 12))
    cache = model.new_cache(3)
    with torch.no_grad():
        pieces = [model(idx[:, :prompt], cache=cache)]  # the logits of the last position alone
        pieces += [model(idx[:, position : position + 1], cache=cache) for position in range(prompt, 12)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx)[:, prompt - 1 :])


def test_the_closed_form_is_the_loss_of_the_counted_table():
    ids = torch.randint(V, (500,), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(V, V)
    for a, b in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        counts[a, b] += 1
    model = models.build(BIGRAM, V, 1)
    model.embedding.weight.data = (counts / counts.sum(1, keepdim=True)).clamp_min(1e-30).log()
    expected = model(ids[None, :-1], ids[None, 1:]).item()
    assert model.lower_bound(ids.numpy()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 48, 16), (1, 16, 64)])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_orthogonalize_brings_every_singular_value_near_one(shape: tuple, has_bfloat16: bool, monkeypatch):
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda device_type: has_bfloat16)
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    assert result.dtype == matrices.dtype
    # Many times slower where there are no instructions for it.
    assert torch.equal(result, result.bfloat16().float()) == has_bfloat16
    values = torch.linalg.svdvals(result)
    assert 0.3 < values.min() < values.max() < 1.55
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.93


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_is_for_matrices_alone_and_every_weight_is_trained_once(optimizer: str):
    model = models.build(TRANSFORMER, V, 1)
    parts = Optimizer(model, TrainConfig(steps=1, optimizer=optimizer, weight_decay=0.1), 1).parts
    groups = [group for part in parts for group in part.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for n, p in model.named_parameters() if n.startswith("h.")}


def test_the_schedule_warms_up_holds_and_decays():
    def factor(step: int, schedule: str = "linear") -> float:
        half = {"warmup_steps": 10, "decay_fraction": 0.5, "final_learning_rate_fraction": 0.1}
        return learning_rate_factor(step, 100, TrainConfig(steps=100, schedule=schedule, **half))

    assert [factor(step) for step in (0, 9, 30, 50)] == pytest.approx([0.1, 1, 1, 1])
    assert [factor(75), factor(75, "cosine")] == pytest.approx([0.1 + 0.9 * 0.5] * 2)
    assert 0.1 < factor(99) < 0.13
    assert factor(99, "constant") == 1
