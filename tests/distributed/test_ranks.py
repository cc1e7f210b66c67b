"""What runs functions on several processes tells what they return, and what goes wrong on one of them."""

import os
import signal

import pytest
import torch
from helpers.ranks import RankError

distributed = torch.distributed


def total(start):
    value = torch.tensor([start + distributed.get_rank()])
    distributed.all_reduce(value)
    return distributed.get_rank(), value.item()


def failing(rank):
    if distributed.get_rank() == rank:
        raise ValueError("on purpose")


def killed(rank):
    if distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def test_every_rank_answers(two_ranks):
    assert two_ranks(total, start=5) == [(0, 11), (1, 11)]
    assert two_ranks(total, start=0) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("function, text", [(failing, "ValueError: on purpose"), (killed, "exit code -9")])
def test_a_failure_is_named_and_the_next_test_starts_anew(two_ranks, function, text):
    with pytest.raises(RankError, match=text) as caught:
        two_ranks(function, rank=1)
    assert "rank 1 of 2" in str(caught.value)
    assert two_ranks(total, start=1) == [(0, 3), (1, 3)]
