import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT

from picogpt import config
from picogpt.errors import PicogptError, UsageError
from picogpt.registry import MODELS, settings_class

GOOD = {"model": {"kind": "char-bigram"}, "train": {"steps": 5}}
GPT2 = ROOT / "config/models/gpt2.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[object], Path]:
    def write(tree: object) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


@pytest.mark.parametrize("path", sorted((ROOT / "config/models").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_are_valid_and_named_after_their_model(path: Path):
    experiment = config.load_experiment(path)
    assert path.stem.startswith(experiment.model.kind.replace("-", "_"))


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_one_file_of_settings_for_all_devices(kind: str):
    assert config.load_experiment(config.model_file(kind)).model.kind == kind


def test_settings_are_named_by_a_path_or_by_the_name_of_a_shipped_file(monkeypatch, tmp_path: Path):
    assert config.model_file("gpt2_fineweb") == ROOT / "config/models/gpt2_fineweb.yaml"
    assert config.model_file("char-transformer").name == "char_transformer.yaml"
    for path in ("mine.yaml", "folder/mine"):
        assert config.model_file(path) == Path(path)
    names = "no settings called mine: give the path of a YAML file, or one of char_bigram"
    with pytest.raises(UsageError, match=names):
        config.model_file("mine")
    # Another folder of settings, as that of a workflow that is not the installed one.
    (tmp_path / "models").mkdir()
    (tmp_path / "models/gpt2.yaml").touch()
    monkeypatch.setenv("PICOGPT_CONFIG", str(tmp_path))
    assert config.model_file("gpt2") == tmp_path / "models/gpt2.yaml"
    monkeypatch.setenv("PICOGPT_CONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"PICOGPT_CONFIG=.*nowhere is not a folder"):
        config.model_file("gpt2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": {"steps": 5, "learning_rat": 1}}, "train.learning_rat: .*did you mean learning_rate.*batch_size"),
        ({"model": {"kind": "char-bigram", "n_layer": 3}}, "model.n_layer: unknown key.*block_size"),
        ({"trian": {}}, "trian: .*did you mean train.*runtime"),
        ({"model": {"kind": "gpt-5"}}, "model: .*char-bigram, char-transformer"),
        ({"train": {"steps": 0}}, "train.steps=0: .*greater than or equal to 1"),
        ({"train": {"steps": "many"}}, 'train.steps="many": .*integer'),
        ({"train": {"steps": 5, "epochs": 2}}, "exactly one of epochs and steps"),
        ({"train": {}}, "exactly one of epochs and steps"),
        ({"train": {"steps": 5, "optimizer": "sgd"}}, 'train.optimizer="sgd": .*adamw.*muon'),
        ({"runtime": {"device": "tpu"}}, 'runtime.device="tpu"'),
        ({"model": {"kind": "char-transformer", "n_embd": 100, "n_head": 3}}, "n_embd=100 .*n_head=6"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(file, change: dict, named: str):
    path = file({**GOOD, **change})
    with pytest.raises(UsageError, match=rf"{path}:\n.*{named}"):
        config.load_experiment(path)


def test_overrides_replace_values_and_keep_the_rest(file):
    train = config.load_experiment(file(GOOD), ["train.seed=7", "train.betas=[0.8, 0.99]", "train.epochs=0.5"]).train
    assert (train.seed, train.betas, train.epochs, train.steps) == (7, (0.8, 0.99), 0.5, None)


@pytest.mark.parametrize("override", ["train.seed", "=3", "train.seed.x=1", "train.seed=[", "train.sed=1"])
def test_a_wrong_override_is_a_usage_error_that_quotes_it(file, override: str):
    with pytest.raises(UsageError, match=re.escape(override)):
        config.load_experiment(file(GOOD), [override])


@pytest.mark.parametrize(
    ("size", "shape"), [("124M", (12, 12, 768)), ("355M", (24, 16, 1024)), ("774M", (36, 20, 1280)), ("1558M", (48, 25, 1600))]
)  # fmt: skip
def test_a_published_size_of_gpt2_is_its_shape_and_nothing_else(size: str, shape: tuple[int, int, int]):
    named = config.load_experiment(GPT2, [f"model.size={size}"])
    keys = zip(("n_layer", "n_head", "n_embd"), shape, strict=True)
    spelled = config.load_experiment(GPT2, [f"model.{key}={number}" for key, number in keys])
    assert named == spelled
    assert named.fingerprint(50257, "0" * 64) == spelled.fingerprint(50257, "0" * 64)
    assert "size" not in named.model.model_dump()


def test_a_size_that_is_none_is_named():
    with pytest.raises(UsageError, match=r"model\.size=\"355\": input should be '124M', '355M', '774M' or '1558M'"):
        config.load_experiment(GPT2, ["model.size='355'"])


def test_files_that_are_no_settings(file, tmp_path: Path):
    with pytest.raises(UsageError, match="is not YAML"):
        config.load_experiment(file("model: [1"))
    with pytest.raises(UsageError, match="mapping"):
        config.load_experiment(file("- 1"))
    with pytest.raises(PicogptError, match="No such file"):
        config.load_experiment(tmp_path / "missing.yaml")


def test_the_fingerprint_follows_what_changes_the_result_and_nothing_else(file):
    def fingerprint(*overrides: str) -> str:
        return config.load_experiment(file(GOOD), overrides).fingerprint(65, "0" * 64)

    assert fingerprint() == fingerprint("runtime.device=cpu", "runtime.log_interval=3", "train.micro_batch_size=1")
    assert len({fingerprint(), fingerprint("train.seed=1"), fingerprint("model.block_size=8")}) == 3


@pytest.mark.parametrize("settings", [config.TrainConfig, config.RuntimeConfig, *map(settings_class, MODELS)])
def test_every_setting_is_described(settings: type[config.Settings]):
    described = {key: text for key, _, text in config.describe(settings)}
    assert set(described) == set(settings.model_fields)
    assert all(described.values())


def test_the_schema_describes_every_key_of_the_configuration_and_accepts_it():
    schema = yaml.safe_load((ROOT / "config/config.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    shipped = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    jsonschema.validate(shipped, schema)
    assert undescribed(schema) == []
    assert set(schema["properties"]) == set(shipped)
    for wrong in ({"corpuss": "x"}, {"run": "a/b"}, {"gpus": -1}, {"gpt2": {**shipped["gpt2"], "dtypes": ["int4"]}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**shipped, **wrong}, schema)


def undescribed(schema: dict) -> list[str]:
    """Keys without a description; those of a group are described one by one."""
    missing = []
    for key, part in schema["properties"].items():
        if "properties" in part:
            missing += undescribed(part)
        elif not part.get("description"):
            missing.append(key)
    return missing
