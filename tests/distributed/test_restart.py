"""torchrun starts all processes again when one has died, and they go on from the adapter that was saved last."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers.models import IDS, adapt, net

import randlora

TARGET = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
STEPS, DIES_IN = 4, 2


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def loss_of(model, rows):
    return (model(IDS[rows]) - TARGET[rows]).square().mean()


def train(folder):
    """What every process runs: two rows each, saving after every step."""
    torch.distributed.init_process_group("gloo")
    rank, first = torch.distributed.get_rank(), 0
    if (folder / "progress.pt").exists():
        progress = torch.load(folder / "progress.pt")
        model = randlora.RandLoraModel.from_pretrained(net(), folder, is_trainable=True)
        optimizer, first = optimizer_of(model), progress["step"]
        optimizer.load_state_dict(progress["optimizer"])
    else:
        model = adapt(net())
        optimizer = optimizer_of(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(first, STEPS):
        if step == DIES_IN and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(3)
        loss_of(parallel, slice(2 * rank, 2 * rank + 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            model.save_pretrained(folder)
            torch.save({"step": step + 1, "optimizer": optimizer.state_dict()}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "progress.pt")
        torch.distributed.barrier()
    (folder / f"started_from_{first}_by_{rank}").touch()
    torch.distributed.destroy_process_group()


def test_a_process_that_dies_costs_a_step_and_no_more(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    paths = [str(Path(randlora.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob(f"started_from_{DIES_IN}_by_?"))) == 2

    expected = adapt(net())
    optimizer = optimizer_of(expected)
    for _ in range(STEPS):
        loss_of(expected, slice(None)).backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = randlora.RandLoraModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(loaded(IDS), expected(IDS), rtol=1e-9, atol=1e-9)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
