"""What the environment says about ranks: only those that a launcher started count."""

import click
import pytest
from torch.distributed.run import get_args_parser

from picogpt.cli.bench import bench
from picogpt.cli.train import train
from picogpt.errors import UsageError
from picogpt.ranks import Ranks, first_to_fail, from_environment

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_LOCALID",
    "SLURM_NTASKS_PER_NODE",
    *RENDEZVOUS,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in (*VARIABLES, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Ranks()),
        ({"WORLD_SIZE": ""}, Ranks()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Ranks()),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **RENDEZVOUS}, Ranks(3, 4, 1, 2)),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2", **RENDEZVOUS},
            Ranks(3, 4, 1, 2),
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", **RENDEZVOUS}, Ranks(1, 2, 0, 1)),  # a pod for each rank
    ],
)
def test_a_launcher_numbers_the_ranks(environment, values: dict[str, str], expected: Ranks):
    environment(**values)
    assert from_environment() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR, MASTER_PORT: start the ranks by torchrun, or unset"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 is in the environment without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two", "RANK": "0", **RENDEZVOUS}, "must be integers.*'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", **RENDEZVOUS}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_variables_that_describe_no_ranks_are_refused(environment, values: dict[str, str], message: str):
    environment(**values)
    with pytest.raises(UsageError, match=message):
        from_environment()


def test_an_exported_world_size_concerns_training_alone_and_every_failure_is_told(environment, picogpt):
    environment(WORLD_SIZE="2", RANK="0")
    for _ in range(2):
        missing = picogpt("tokenize", "char", "--text", "missing.txt")
        assert (missing.status, missing.err.count("missing.txt")) == (1, 1)
    assert picogpt("hardware").status == 0


def test_of_the_ranks_of_a_torchrun_job_the_first_to_fail_speaks(environment, tmp_path):
    for attempt in ("0", "1"):
        speaks = []
        for rank in ("0", "1"):
            (tmp_path / attempt / rank).mkdir(parents=True)
            environment(TORCHELASTIC_ERROR_FILE=str(tmp_path / attempt / rank / "error.json"))
            speaks.append(first_to_fail())
        assert speaks == [True, False]


def test_torchrun_leaves_our_options_to_us():
    """It takes options by their beginning: one of ours that begins one of its own would be ambiguous, or taken."""
    theirs = [option for action in get_args_parser()._actions for option in action.option_strings]
    ours = [parameter for command in (train, bench.commands["train"]) for parameter in command.params]
    ours = [parameter for parameter in ours if isinstance(parameter, click.Option)]
    taken = {option for parameter in ours for option in parameter.opts if any(t.startswith(option) for t in theirs)}
    assert taken == {"--run"}  # the other spelling of --name, for commands without torchrun
    assert [parameter.opts for parameter in ours if "--run" in parameter.opts] == [["--name", "--run"]]
