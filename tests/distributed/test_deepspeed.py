"""DeepSpeed's ZeRO on two gloo processes: adapted models train as on one, and their files are the ordinary ones."""

import os

import pytest
import torch
from helpers.models import IDS, adapt, layers_of, net, randomize, tiny_llama
from torch.multiprocessing.reductions import StorageWeakRef

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


def assert_files_of(folder, expected):
    """The adapter in `folder` is that of `expected`, a model on one process."""
    loaded = randlora.RandLoraModel.from_pretrained(net(torch.float32), folder)
    wanted = dict(expected.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-6, atol=1e-6, msg=f"{name} differs")


def training(stage, kind, folder):
    rank = distributed.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    expected, model = trained_alone(kind), adapt(net(torch.float32), kind=kind)
    engine, memory = engine_of(model, stage), []
    hooks = [
        layer.base_layer.register_forward_hook(
            lambda base, *_: memory.append(StorageWeakRef(base.weight.untyped_storage())), prepend=True
        )
        for layer in layers_of(model).values()
    ]
    loss = loss_of(engine, rows)
    assert all(ref.expired() == (stage == 3) for ref in memory), "what backward needs is gathered again"
    for hook in hooks:
        hook.remove()
    engine.backward(loss)
    engine.step()
    for _ in range(STEPS - 1):
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
        model.save_pretrained(f"{folder}/gathered")
        assert_files_of(f"{folder}/gathered", expected)
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


class Checkpointed(torch.nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)


def options(reentrant):
    rank = distributed.get_rank()
    expected, model = (adapt(net(torch.float32), modules_to_save=["head"]) for _ in range(2))
    for m in (expected, model):
        m.add_adapter("b", randlora.RandLoraConfig(r=3, randlora_alpha=2, target_modules=["q_proj", "down_proj"]))
        randomize(m, "b", 7)
        m.set_adapter(["default", "b"])
        m.model.embed.register_forward_hook(lambda _, __, y: y.requires_grad_())
        m.model.layers = torch.nn.ModuleList([Checkpointed(block, reentrant) for block in m.model.layers])
    engine = engine_of(model, 3, gradient_accumulation_steps=2, train_micro_batch_size_per_gpu=1)
    optimizer = sgd(expected)
    for _ in range(STEPS):
        loss_of(expected).backward()
        optimizer.step()
        optimizer.zero_grad()
        for micro in range(2):
            step(engine, slice(2 * rank + micro, 2 * rank + micro + 1))
    model.eval(), expected.eval()
    with torch.no_grad():
        torch.testing.assert_close(engine(IDS), expected(IDS), rtol=1e-5, atol=1e-5)
        names = {"adapter_names": ["default", "b", "__base__", "b"]}
        torch.testing.assert_close(engine(IDS, **names), expected(IDS, **names), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="GatheredParameters"):
            model.merge_adapter()
        for method in (model.merge_adapter, model.unmerge_adapter):
            with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
                method()
            torch.testing.assert_close(engine(IDS), expected(IDS), rtol=1e-5, atol=1e-5)
    engine.train()
    step(engine, slice(2 * rank, 2 * rank + 1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_several_adapters_accumulated_gradients_and_merging(two_ranks, reentrant):
    two_ranks(options, reentrant=reentrant)


def in_bf16(folder):
    rank = distributed.get_rank()
    model = adapt(net(torch.bfloat16))
    engine = engine_of(model, 3, bf16={"enabled": True})
    before = step(engine, slice(2 * rank, 2 * rank + 2))
    for _ in range(STEPS):
        after = step(engine, slice(2 * rank, 2 * rank + 2))
    assert after < before
    model.save_pretrained(folder)
    loaded = randlora.RandLoraModel.from_pretrained(net(torch.bfloat16), folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), engine(IDS), rtol=0.03, atol=0.06)


def test_bf16(two_ranks, tmp_path):
    two_ranks(in_bf16, folder=str(tmp_path))


def by_accelerate(folder, library):
    """transformers' from_pretrained partitions the base model; then it is adapted."""
    import accelerate
    import transformers
    from safetensors.torch import load_file

    rank = distributed.get_rank()
    if rank == 0:
        tiny_llama().save_pretrained(f"{folder}/base")
    distributed.barrier()

    def adapted():
        base = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        targets = ["q_proj", "down_proj"]
        if library == "randlora":
            return adapt(base, target_modules=targets, modules_to_save=["lm_head"])
        import peft

        import randlora.integrations.peft

        with randlora.integrations.peft.enable():
            model = peft.get_peft_model(base, peft.RandLoraConfig(r=4, randlora_alpha=3, target_modules=targets))
        with torch.no_grad():
            for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        return model

    expected = adapted()
    kept = transformers.integrations.HfDeepSpeedConfig(settings(3))
    model = adapted()
    assert sum(map(zero3.is_partitioned, model.parameters())) > 10, kept
    plugin = accelerate.utils.DeepSpeedPlugin(hf_ds_config=settings(3) | {"gradient_accumulation_steps": 1})
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    ids = torch.randint(0, 19, (4, 6), generator=torch.Generator().manual_seed(0))
    rows = slice(2 * rank, 2 * rank + 2)
    alone = sgd(expected)
    engine, optimizer = accelerator.prepare(model, sgd(model))
    with torch.no_grad():
        # Not by the engine, which has not been called yet.
        words = model.generate(ids[:, :3], max_new_tokens=3, synced_gpus=True)
        assert torch.equal(words, expected.generate(ids[:, :3], max_new_tokens=3))
    for _ in range(STEPS):
        accelerator.backward(engine(ids[rows], labels=ids[rows]).loss)
        expected(ids, labels=ids).loss.backward()
        for each in (optimizer, alone):
            each.step()
            each.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(engine(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    state = accelerator.get_state_dict(engine)
    # accelerator.is_main_process is True on both here: accelerate has no DeepSpeed on CPUs.
    accelerator.unwrap_model(engine).save_pretrained(f"{folder}/state", is_main_process=rank == 0, state_dict=state)
    if rank == 0:
        expected.save_pretrained(f"{folder}/expected")
        found, wanted = (load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("state", "expected"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["randlora", "peft"])
def test_accelerate(two_ranks, library, tmp_path):
    for name in ("accelerate", library):
        pytest.importorskip(name)
    try:
        two_ranks(by_accelerate, folder=str(tmp_path), library=library)
    finally:
        two_ranks.stop()  # accelerate and transformers keep the engine in mind
