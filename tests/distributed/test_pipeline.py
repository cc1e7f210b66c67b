"""Pipelines of torch.distributed.pipelining: two stages train as one process, with the bases once on each."""

import pytest
import torch
from helpers.models import IDS, SETTINGS, Net, adapt, layers_of, net

import randlora

distributed = torch.distributed
TARGET = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def loss_of(y, target):
    return (y - target).square().mean()


class Stage(torch.nn.Module):
    """One block, and the embedding before it or the head behind it; modules of the adapted model."""

    def __init__(self, model, first):
        super().__init__()
        self.embed = model.embed if first else torch.nn.Identity()
        self.block = model.layers[0 if first else 1]
        self.head = torch.nn.Identity() if first else model.head

    def forward(self, x):
        return self.head(self.block(self.embed(x)))


def by_hand(model):
    from torch.distributed.pipelining import PipelineStage

    rank = distributed.get_rank()
    return PipelineStage(Stage(model.model, rank == 0), rank, 2, torch.device("cpu"))


def traced(model):
    from torch.distributed.pipelining import SplitPoint, pipeline

    pipe = pipeline(model.model, mb_args=(IDS[:1],), split_spec={"layers.1": SplitPoint.BEGINNING})
    return pipe.build_stage(distributed.get_rank(), torch.device("cpu"))


def train(stage, schedule_class, steps=3):
    """The losses of some steps; those of the last stage count."""
    optimizer = torch.optim.SGD([p for p in stage.submod.parameters() if p.requires_grad], lr=1e-3)
    schedule, found = schedule_class(stage, 4, loss_fn=loss_of), []
    for _ in range(steps):
        losses = []
        schedule.step(*((IDS,) if stage.is_first else ()), target=TARGET, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(loss.item() for loss in losses) / 4)
    return found


def train_alone(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(steps):
        loss = loss_of(model(IDS), TARGET)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def gathered(model, stage):
    """What the stages have trained, by its names in the whole model, on rank 0."""
    mine = {id(p) for p in stage.submod.parameters()}
    part = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad and id(p) in mine}
    parts = [None] * 2 if distributed.get_rank() == 0 else None
    distributed.gather_object(part, parts)
    return {name: value for part in parts or () for name, value in part.items()}


def pipelined(kind, make, schedule, folder):
    from torch.distributed import pipelining

    expected, model = (adapt(net(), kind=kind) for _ in range(2))
    bases = next(iter(layers_of(model).values())).bases["default"]
    stage = {"by_hand": by_hand, "traced": traced}[make](model)
    wanted, losses = train_alone(expected), train(stage, getattr(pipelining, schedule))
    if stage.is_last:
        torch.testing.assert_close(losses, wanted, rtol=1e-10, atol=1e-10)
    # One copy for the device, of one form, and none for shapes alone.
    assert len(bases.copies.dense) + len(bases.copies.packed) == 1
    assert not any(key[1].type == "meta" for key in bases.copies.dense)
    if make == "traced":
        constants = list(stage.submod.buffers())
        assert sum(t.nbytes for t in constants) <= bases.nbytes
    state = gathered(model, stage)
    if distributed.get_rank() == 0:
        with torch.device("meta"):
            whole = randlora.get_peft_model(Net().double(), randlora.RandLoraConfig(**SETTINGS, kind=kind))
        whole.save_pretrained(f"{folder}/stages", state_dict=state)
        expected.save_pretrained(f"{folder}/alone")
        loaded, wanted = (
            randlora.RandLoraModel.from_pretrained(net(), f"{folder}/{name}") for name in ("stages", "alone")
        )
        torch.testing.assert_close(loaded(IDS), wanted(IDS), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make, schedule, kind",
    [
        ("by_hand", "ScheduleGPipe", "dense"),
        ("by_hand", "Schedule1F1B", "hadamard"),
        ("traced", "ScheduleGPipe", "dense"),
        ("traced", "Schedule1F1B", "very_sparse"),
    ],
)
def test_two_stages(two_ranks, kind, make, schedule, tmp_path):
    two_ranks(pipelined, kind=kind, make=make, schedule=schedule, folder=str(tmp_path))


def interleaved():
    """A rank with two stages has the bases once, too."""
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

    rank, device = distributed.get_rank(), torch.device("cpu")
    expected, model = adapt(net()), adapt(net())
    inner = model.model
    blocks = [
        torch.nn.Sequential(inner.embed, Half(inner.layers[0], 0)),
        Half(inner.layers[0], 1),
        Half(inner.layers[1], 0),
        torch.nn.Sequential(Half(inner.layers[1], 1), inner.head),
    ]
    stages = [PipelineStage(blocks[i], i, 4, device) for i in (rank, rank + 2)]
    schedule, losses = ScheduleInterleaved1F1B(stages, 4, loss_fn=loss_of), []
    schedule.step(*((IDS,) if rank == 0 else ()), target=TARGET, losses=losses)
    loss = loss_of(expected(IDS), TARGET)
    loss.backward()
    gradients, count = dict(expected.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-10, atol=1e-10)
            count += 1
    assert count == 8
    bases = next(iter(layers_of(model).values())).bases["default"]
    assert list(bases.copies.dense) == [(torch.float64, device)] and not bases.copies.packed


class Half(torch.nn.Module):
    """The first or the second sum of a block."""

    def __init__(self, block, which):
        super().__init__()
        self.parts = torch.nn.ModuleList(
            (block.q_proj, block.v_proj) if which == 0 else (block.up_proj, block.down_proj)
        )
        self.which = which

    def forward(self, x):
        first, second = self.parts
        return x + (torch.tanh(first(x)) * second(x) if self.which == 0 else second(torch.tanh(first(x))))


def test_several_stages_on_a_rank(two_ranks):
    two_ranks(interleaved)
