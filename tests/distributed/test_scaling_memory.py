"""What two ranks hold with DDP and FSDP2 after a step, and what ``python -m bench scaling`` says that they hold."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import shapes  # noqa: E402
from bench.scaling_engines import Case, Plan, memory  # noqa: E402
from bench.scaling_model import DENSE, HADAMARD, LORA, MODELS  # noqa: E402

# Rows in odd numbers: lambda has 7, gamma 10 (or LoRA's factor 4), so that the ranks hold different numbers of them.
RANK, TOKENS = 7, 32


def held(method, engine, lora_rank):
    """Bytes on this rank: weights, trained numbers, their gradients and Adam's moments, bases, and DDP's buckets."""
    import peft
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import randlora
    from bench import methods
    from bench.training import storages

    shape = MODELS[shapes.TINY]
    model = shape.build().requires_grad_(False)
    if method == LORA:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=lora_rank, target_modules="all-linear"))
    else:
        config = randlora.RandLoraConfig(r=RANK, target_modules="all-linear", kind=method, projection_prng_key=17)
        adapted = randlora.get_peft_model(model, config)
    if engine == "FSDP2":
        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        run = fully_shard(adapted, mesh=mesh)
    else:
        run = DistributedDataParallel(adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.arange(TOKENS).reshape(2, -1) % 50
    run(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

    def size(tensors):
        local = [t.to_local() if isinstance(t, torch.distributed.tensor.DTensor) else t for t in tensors]
        return sum(t.numel() * t.itemsize for t in local)

    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    buckets = run._get_ddp_logging_data()["bucket_sizes"].split(", ") if engine == "DDP" else []
    return {
        "weights": size(p for p in adapted.parameters() if not p.requires_grad), "trained": size(trained),
        "gradients": size(p.grad for p in trained), "adam": size(moments),
        "bases": sum(storages(methods.bases(adapted)).values()),
        **({"buffers": sum(map(int, buckets))} if buckets else {}),
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
@pytest.mark.parametrize("method", [DENSE, HADAMARD, LORA])
def test_two_ranks_hold_what_is_computed(method, engine, two_ranks):
    case = Case(shapes.TINY, TOKENS, TOKENS // 2, RANK)
    plan = Plan(engine, replicas=2) if engine == "DDP" else Plan(engine, shards=2)
    rank = case.call(plan).adapters[LORA].told["rank"]
    found = two_ranks(held, method=method, engine=engine, lora_rank=rank)
    told = memory(case, plan, method)
    assert {part: max(on_rank[part] for on_rank in found) for part in found[0]} == {
        part: told[part] for part in found[0]
    }
