"""A rank that dies or stands still ends the others with an error, and a save that dies with it leaves the old files."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from helpers.models import IDS, adapt, net
from helpers.ranks import RankError
from torch import nn

import randlora
from randlora.checkpoint import replace, writing

distributed = torch.distributed

LIMIT = 6  # seconds: a group's timeout


def training(seed=1):
    group = distributed.new_group(timeout=timedelta(seconds=LIMIT))
    ddp = nn.parallel.DistributedDataParallel(adapt(net(), seed=seed), process_group=group)
    optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=0.1)

    def step():
        optimizer.zero_grad()
        ddp(IDS).square().sum().backward()
        optimizer.step()

    return ddp, step


def timed(step):
    """`step`, and what it raises with the seconds it took."""
    start = time.monotonic()
    try:
        step()
    except RuntimeError as error:
        raise RuntimeError(f"after {time.monotonic() - start:.0f} seconds") from error


def lost(at, how):
    _, step = training()
    for i in range(2):
        if (distributed.get_rank(), i) == (1, at):
            os.kill(os.getpid(), how)
        timed(step)


@pytest.mark.parametrize(
    "at, how, seconds, words",
    [
        # The ranks are compared then, which must not wait for ever, either.
        (0, signal.SIGSTOP, range(LIMIT - 1, 3 * LIMIT), "Timed out waiting"),
        (1, signal.SIGKILL, range(LIMIT), "by peer"),
    ],
    ids=["stands still in the first step", "killed in the second"],
)
def test_a_lost_rank_ends_the_others(two_ranks, at, how, seconds, words):
    with pytest.raises(RankError) as caught:
        two_ranks(lost, at=at, how=how)
    of_first, of_second = str(caught.value).split("rank 1 of 2:")
    assert words in of_first and any(f"after {n} seconds" in of_first for n in seconds), of_first
    assert of_second.strip() == ("ended with exit code -9" if how == signal.SIGKILL else "no answer in time")


def half_written(tensors, path, metadata):
    path.write_bytes(b"\x08" * 100)
    os._exit(7)


def dying_in_save(folder, where):
    ddp, step = training()
    step()
    if distributed.get_rank() == 0:
        ddp.module.save_pretrained(folder)
    step()
    if distributed.get_rank() == 0:
        if where == "writing":
            writing.save_file = half_written
        else:
            replace.os.replace = lambda *_: os._exit(7)
        ddp.module.save_pretrained(folder)
    timed(step)


@pytest.mark.parametrize("where", ["writing", "replacing"])
def test_a_save_that_dies_leaves_the_old_files(two_ranks, tmp_path, where):
    with pytest.raises(RankError) as caught:
        two_ranks(dying_in_save, folder=str(tmp_path), where=where)
    of_first, of_second = str(caught.value).split("rank 1 of 2:")
    assert "ended with exit code 7" in of_first and "by peer" in of_second

    expected = adapt(net())
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=0.1)
    expected(IDS).square().sum().backward()
    optimizer.step()
    loaded = randlora.RandLoraModel.from_pretrained(net(), tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded(IDS), expected(IDS))
    loaded.save_pretrained(tmp_path)  # and clears what is left of the other save
    assert len(os.listdir(tmp_path)) == 3
