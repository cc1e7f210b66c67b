"""DeepSpeed's ZeRO on two gloo processes: adapted models train as on one, and their files are the ordinary ones."""

import os

import pytest
import torch
from helpers.models import IDS, adapt, layers_of, net, randomize, tiny_llama

import randlora
from randlora.distributed import zero3

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")
distributed = torch.distributed
TARGET = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(7))
RATE, STEPS = 1e-3, 4


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def loss_of(model, rows=slice(None)):
    return (model(IDS[rows]) - TARGET[rows]).square().mean()


def trained_alone(kind):
    model = adapt(net(torch.float32), kind=kind)
    optimizer = sgd(model)
    for _ in range(STEPS):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def settings(stage, **changes):
    zero = {"stage": stage}
    if stage == 3:  # partition the small parameters of tests, too
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    } | changes  # fmt: skip


def engine_of(model, stage, **changes):
    return deepspeed.initialize(
        model=model, optimizer=sgd(model), config=settings(stage, **changes), dist_init_required=False
    )[0]


def step(engine, rows):
    loss = loss_of(engine, rows)
    engine.backward(loss)
    engine.step()
    return loss.item()


def assert_files_of(folder, expected, tolerance=1e-6):
    """The adapter in `folder` is that of `expected`, a model on one process."""
    loaded = randlora.RandLoraModel.from_pretrained(net(torch.float32), folder)
    wanted = dict(expected.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def training(stage, kind, folder):
    rank = distributed.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    expected, model = trained_alone(kind), adapt(net(torch.float32), kind=kind)
    engine = engine_of(model, stage)
    for _ in range(STEPS):
        step(engine, rows)
    assert all(zero3.is_partitioned(p) == (stage == 3) for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS), expected(IDS), rtol=1e-5, atol=1e-5)
        engine.eval()
        with randlora.inference_cache():
            for _ in range(3):  # not by the engine, as generate() calls it
                torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-5, atol=1e-5)
        engine.train()
    if rank == 0 or stage == 3:
        model.save_pretrained(f"{folder}/{rank}")
        assert_files_of(f"{folder}/{rank}", expected)
    if stage == 3:
        state = engine._zero3_consolidated_16bit_state_dict()  # as accelerate's get_state_dict
        if rank == 0:
            model.save_pretrained(f"{folder}/state", state_dict=state)
            assert_files_of(f"{folder}/state", expected)
    engine.save_checkpoint(f"{folder}/checkpoint", exclude_frozen_parameters=True)
    if rank == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/checkpoint")
        model.save_pretrained(f"{folder}/fp32", state_dict=state)
        assert_files_of(f"{folder}/fp32", expected)
    distributed.barrier()
    again = engine_of(adapt(net(torch.float32), kind=kind, seed=9), stage)
    again.load_checkpoint(f"{folder}/checkpoint", load_module_strict=False)
    assert step(again, rows) == step(engine, rows)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_training_saving_and_resuming(two_ranks, stage, kind, tmp_path):
    two_ranks(training, stage=stage, kind=kind, folder=str(tmp_path))
