"""``two_ranks`` and ``four_ranks`` call a function on that many gloo processes, kept for the tests of a file."""

from pathlib import Path

import pytest
import torch
from helpers.ranks import Ranks


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.distributed)


def _ranks(size):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two_ranks():
    yield from _ranks(2)


@pytest.fixture(scope="module")
def four_ranks():
    yield from _ranks(4)
