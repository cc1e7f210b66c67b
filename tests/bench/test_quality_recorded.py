"""Steps that are replayed as CUDA graphs give what steps give."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench.quality import methods, training  # noqa: E402
from bench.quality.recorded import leaves  # noqa: E402
from bench.quality.tiny import TinyTask  # noqa: E402

NAMES = ("full fine-tuning", "PEFT LoRA r=8", "PEFT RandLoRA r=32", "PEFT DoRA r=16")
NAMES += tuple(f"{kind} r=8" for kind in methods.KINDS)


def trained(name, recorded):
    task, method = TinyTask(), methods.methods()[name]
    adapted, groups = training.build(task, method, 0, "cuda")
    trainer = training.Trainer(task, adapted, groups, 3e-3, 40, "cuda", recorded)
    batches = [
        {key: value[: 8 - 4 * (i % 3 == 1)] for key, value in batch.items()}
        for i, batch in enumerate(training.batches(task, 3, 40))
    ]
    losses = torch.stack(trainer.train(batches))
    return losses, [p.detach() for p in trainer.trained], trainer


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_are_the_steps(name):
    expected, parameters, _ = trained(name, False)
    losses, others, trainer = trained(name, True)
    assert trainer.record.works and len(trainer.record.graphs) == 2
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(others, parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_leaves_of_a_batch():
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(leaf) for leaf in leaves({"a": one, "b": (two, [three])})] == [1, 2, 3]
    with pytest.raises(TypeError, match="must consist of tensors, got str"):
        leaves((one, "words"))
