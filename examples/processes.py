"""One process of several, as torchrun and accelerate launch start them: who it is, its share of the work, the sums."""

import contextlib
import os

import torch
from text_data import UserError
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def started():
    """How many processes the launcher has started; one without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def count():
    """How many processes work together now."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def own_gpu():
    """The GPU of this process: the launcher counts the processes of a machine."""
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(f"process {index} of this machine has no GPU of its own: there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def join(device):
    """Work together from now on, if there are several processes."""
    if started() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave():
    """Work alone from now on."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def only_the_first_prints():
    """The others' standard output is dropped meanwhile."""
    if which_of_the_others():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    else:
        yield


def which_of_the_others():
    """For messages: empty in the first process, which is the only one without a launcher."""
    number = int(os.environ.get("RANK", 0))
    return f" in process {number}" if number else ""


def share(items):
    """Every so many-th item, beginning with that of this process's number."""
    return items[rank() :: count()]


def averaging(model, device):
    """`model` with gradients that are averaged over the processes in every backward; it starts as the first's."""
    if count() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def total(*numbers, device):
    """The sum of each number over the processes."""
    if count() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def gathered(items):
    """The items of all processes."""
    if count() == 1:
        return items
    lists = [None] * count()
    distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]
