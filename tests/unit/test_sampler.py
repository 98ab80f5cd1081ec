from collections import Counter

import numpy as np
import pytest

from picogpt.data.sampler import Sampler, sequential
from picogpt.errors import PicogptError

IDS = np.arange(1000) % 250


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 12])
def test_each_window_comes_once_an_epoch(world_size: int, batch_size: int):
    sampler = Sampler(IDS, block_size=16, batch_size=batch_size, seed=3)
    steps = 2 * sampler.windows  # a whole number of epochs for every batch size
    drawn = [
        start
        for step in range(steps)
        for rank in range(world_size)
        for start in sampler.starts(step, rank, world_size).tolist()
    ]
    for epoch in range(2 * batch_size):
        starts = drawn[epoch * sampler.windows : (epoch + 1) * sampler.windows]
        offset = min(starts)
        assert 0 <= offset < 16
        assert sorted(starts) == [offset + 16 * window for window in range(sampler.windows)]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_batch_of_one(world_size: int):
    sampler = Sampler(IDS, block_size=16, batch_size=8, seed=3)
    for step in (0, 1, 50):
        whole = sampler.batch(step)
        parts = [sampler.batch(step, rank, world_size) for rank in range(world_size)]
        for one, split in zip(whole, zip(*parts, strict=True), strict=True):
            assert np.array_equal(one, np.concatenate(split))


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = Sampler(IDS, 16, 1, seed)
        return [int(sampler.starts(epoch * sampler.windows + step)[0]) for step in range(sampler.windows)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_targets_are_the_next_tokens():
    inputs, targets = Sampler(IDS, 16, 4, 0).batch(7)
    assert inputs.dtype == np.int64
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert np.array_equal((inputs + 1) % 250, targets)


def test_steps_and_epochs_agree():
    sampler = Sampler(IDS, 16, 8, 0)
    assert sampler.epoch(sampler.steps(3)) >= 3 > sampler.epoch(sampler.steps(3) - 1)


def test_too_few_tokens_say_how_many_are_needed():
    with pytest.raises(PicogptError, match="has 1,000 tokens; block_size=600 needs at least 1,200"):
        Sampler(IDS, 600, 1, 0)


@pytest.mark.parametrize("count", [2, 16, 17, 18, 33, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_sees_every_target_once_in_order(count: int, batch_size: int):
    ids = np.arange(count)
    targets = [target for _, batch in sequential(ids, 16, batch_size) for target in batch.flatten().tolist()]
    assert Counter(targets) == Counter(range(1, count))
    assert targets == sorted(targets)
