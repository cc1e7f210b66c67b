"""accelerate on two processes, by the config files of examples/accelerate: DDP, FSDP2, states that hold adapters."""

import os

import pytest
import torch
from helpers.accelerated import environment, on_cpus
from helpers.models import IDS, Block, adapt, net
from torch import nn

from randlora import RandLoraModel
from randlora.integrations.accelerate import save_adapters_only

accelerate = pytest.importorskip("accelerate")


def model(**settings):
    base = net(torch.float32)
    base._no_split_modules = [Block.__name__]  # as transformers' models have it
    return adapt(base, modules_to_save=["head"], **settings)


def step(accelerator, wrapped, optimizer):
    loss = wrapped(IDS[accelerator.process_index :: 2]).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(loss.detach(), "mean").item()


def prepared(accelerator, made):
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.01)
    return accelerator.prepare(made, optimizer)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()


def trained(made):
    return {name.removeprefix("module."): whole(p) for name, p in made.named_parameters() if p.requires_grad}


# ---- DDP ----


def save_and_load_a_state(told, folder):
    with on_cpus(told):
        accelerator = accelerate.Accelerator()
        save_adapters_only(accelerator)
        made, other = model(randlora_dropout=0.2), nn.Linear(3, 3)
        wrapped, optimizer = prepared(accelerator, made)
        second = accelerator.prepare(other)
        torch.manual_seed(5)
        step(accelerator, wrapped, optimizer)
        accelerator.save_state(folder)
        before, parameters = trained(made), [id(p) for p in made.parameters()]
        first = [step(accelerator, wrapped, optimizer) for _ in range(2)]
        after = trained(made)
        with torch.no_grad():
            other.weight.zero_()
        accelerator.load_state(folder)
        assert parameters == [id(p) for p in made.parameters()] and other.weight.any()
        assert all(torch.equal(before[name], number) for name, number in trained(made).items())
        again = [step(accelerator, wrapped, optimizer) for _ in range(2)]
        assert all(torch.equal(after[name], number) for name, number in trained(made).items())
        return first, again, type(wrapped).__name__, type(second).__name__


def test_a_state_holds_adapters_and_training_goes_on_from_it(two_ranks, tmp_path):
    """Bit for bit: accelerate keeps the states of the random number generators, from which the masks are drawn."""
    for first, again, *wrappers in two_ranks(save_and_load_a_state, told=environment("ddp.yaml"), folder=str(tmp_path)):
        assert first == again and wrappers == ["DistributedDataParallel"] * 2
    names = os.listdir(tmp_path)
    assert sorted(os.listdir(tmp_path / "adapters")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    weights = [name for name in names if name.endswith(".safetensors")]
    assert weights == ["model.safetensors"] and (tmp_path / weights[0]).stat().st_size < 500  # that of the other model
    RandLoraModel.from_pretrained(net(torch.float32), tmp_path / "adapters")


# ---- FSDP2 ----


def train_sharded(told, folder, efficient):
    with on_cpus(told | {"FSDP_CPU_RAM_EFFICIENT_LOADING": efficient}):
        accelerator = accelerate.Accelerator()
        with pytest.raises(ValueError, match=r"writes all that FSDP shards by itself"):
            save_adapters_only(accelerator)
        has_numbers = accelerator.is_main_process or efficient == "false"
        wrapped, optimizer = prepared(accelerator, model(seed=1 if has_numbers else 7))
        groups = [name for name, m in wrapped.named_modules() if type(m).__name__.startswith("FSDP")]
        losses = [step(accelerator, wrapped, optimizer) for _ in range(3)]
        numbers = trained(wrapped)
        state = accelerator.get_state_dict(wrapped)
        accelerator.unwrap_model(wrapped).save_pretrained(
            folder, is_main_process=accelerator.is_main_process, state_dict=state
        )
        accelerator.wait_for_everyone()
        return groups, losses, numbers


@pytest.mark.parametrize("efficient", ["true", "false"])
def test_fsdp2_gives_the_losses_and_numbers_of_one_process(two_ranks, tmp_path, efficient):
    alone = model()
    optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = alone(IDS).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    told = environment("fsdp2.yaml")
    for groups, sharded, numbers in two_ranks(train_sharded, told=told, folder=tmp_path, efficient=efficient):
        assert {"model.layers.0", "model.layers.1"} <= set(groups)  # each with its own lambda and gamma
        assert sharded == pytest.approx(losses, rel=1e-5)
        for name, number in trained(alone).items():
            torch.testing.assert_close(numbers[name], number, rtol=1e-4, atol=1e-6)
    loaded = RandLoraModel.from_pretrained(net(torch.float32), tmp_path)
    torch.testing.assert_close(loaded(IDS), alone(IDS), rtol=1e-4, atol=1e-5)
