"""bench/: every method on a small model, checked as the benchmarks check it; and that these checks can fail."""

import dataclasses
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import generate, methods, plain, shapes  # noqa: E402
from bench.training import Training, saved_bytes, step, storages  # noqa: E402


def tiny_llama(depth, vocab):
    return shapes._llama(depth, vocab, hidden_size=48, intermediate_size=88, num_attention_heads=8)


SIZE = shapes.Size(2, 60, 2, 7, torch.float32)
LLAMA = shapes.Shape(
    "tiny", tiny_llama, SIZE, SIZE, SIZE, targets=["q_proj", "v_proj", "up_proj", "down_proj"], width=48, causal=True
)


def training(dtype=torch.float32, **changes):
    size = dataclasses.replace(SIZE, dtype=dtype)
    return Training(LLAMA, size, LLAMA.setting(size, rank=5, vera_rank=9, **changes), "cpu")


def eager(dtype):
    return [name for name in methods.suitable(dtype) if "compiled" not in name]  # that takes a minute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_computes_and_trains(dtype):
    case = training(dtype)
    for name in eager(dtype):
        run = case.provider(name).run
        loss, error = run()
        assert case.check((loss, error)) == error
        later = [run()[0] for _ in range(20)][-1]
        assert (later < loss) == (name != methods.FROZEN), name
    assert case.found["PEFT RandLoRA"]["trainable_parameters"] == case.found["randlora"]["trainable_parameters"]
    assert case.found["randlora"]["saved_bytes"] < case.found["PEFT RandLoRA"]["saved_bytes"]
    with torch.no_grad():  # all of them worked on copies, or on frozen weights
        assert LLAMA.loss(case.model, case.inputs).item() == case.loss


@pytest.mark.parametrize("name", ["PyTorch", "PEFT RandLoRA", "randlora", "randlora sparse"])
def test_a_wrong_update_is_noticed(name, monkeypatch):
    case = training()
    case.provider(name)
    adapt = methods.adapt

    def wrong(*arguments):
        adapted = adapt(*arguments)
        layer = methods.pairs(adapted)[-1].layer
        layer.scaling = 1.05 * layer.scaling if isinstance(layer.scaling, float) else {"default": 1.05 * 2}
        return adapted

    monkeypatch.setattr(methods, "adapt", wrong)
    monkeypatch.setattr(case, "_expected", dict(case._expected))
    with pytest.raises(AssertionError, match="off by"):
        case.provider(name)


def test_an_adapter_that_is_not_zero_at_the_start_is_noticed(monkeypatch):
    adapt = methods.adapt

    def wrong(*arguments):
        methods.set_random(adapted := adapt(*arguments))
        return adapted

    monkeypatch.setattr(methods, "adapt", wrong)
    with pytest.raises(AssertionError, match="before anything is trained"):
        training().provider("randlora")


def test_bases_of_every_method():
    """Of the sizes that the largest layer needs, once; PEFT takes the largest input and output of different layers."""
    case = training()
    elements = 5 * 48 + 1024 * 10 * 5  # q_proj is 48 -> 1024
    expected = {"PyTorch": elements, "randlora": elements, "PEFT RandLoRA": 5 * 88 + 1024 * 18 * 5, "PEFT LoRA": 0}
    for name, count in expected.items():
        adapted = methods.adapt(name, case.model, case.setting)
        LLAMA.loss(adapted, case.inputs)
        assert sum(storages(methods.bases(adapted)).values()) == 4 * count, name


def test_random_parameters_are_equal_and_temporary():
    case = training()
    values = []
    for name in methods.FAMILY[2:]:
        adapted = methods.adapt(name, case.model, case.setting)
        before = [p.lam.clone() for p in methods.pairs(adapted)]
        with methods.random_parameters(adapted):
            values.append([t.clone() for p in methods.pairs(adapted) for t in (p.lam, p.gamma)])
        assert all(torch.equal(p.lam, b) for p, b in zip(methods.pairs(adapted), before, strict=True))
    assert all(torch.equal(a, b) for other in values[1:] for a, b in zip(values[0], other, strict=True))
    assert len({p.name for p in methods.pairs(adapted)}) == 8


def test_targets_that_match_nothing():
    model = LLAMA.build()
    with pytest.raises(ValueError, match=r"matches no linear layer.*q_proj"):
        methods.layers(model, methods.Setting(["query"]))
    with pytest.raises(ValueError, match="a list of names or 'all-linear'"):
        methods.layers(model, methods.Setting("q_proj"))
    found = methods.layers(model, methods.Setting("all-linear"))
    assert len(found) == 2 * 7 and "lm_head" not in found


def test_saved_bytes_counts_what_is_kept_once():
    model = torch.nn.Linear(6, 6)
    x = torch.randn(4, 6, requires_grad=True)
    saved, _ = saved_bytes(model, lambda: (model(x) * model(x).detach()).sum())
    assert saved == (4 * 6 + 4 * 6) * 4  # x once, the detached factor; the weight is not counted


def test_what_was_counted_is_freed():
    """Kept with its graph, a step of each method stays in memory, and the last of them find none left."""
    layer, kept = torch.nn.Linear(3, 4), []

    def forward():
        kept.append(weakref.ref(hidden := layer(torch.ones(2, 3)).exp()))
        return (hidden * hidden).sum()

    _, loss = saved_bytes(layer, forward)
    del loss
    gc.collect()
    assert kept[0]() is None


def test_multiply_adds():
    case = training()
    projections = 48 * 8 * 128 * 2 + 48 * 8 * 128 * 2  # q, o; k, v
    per_layer, tokens = projections + 3 * 48 * 88, 2 * 7
    linear = 2 * tokens * (2 * per_layer + 48 * 60)
    attention = 2 * 2 * 8 * (2 + 4) * 7 * 7 * 128  # layers, samples, heads, forward and backward products
    assert case.multiply_adds() == pytest.approx(linear + attention, rel=0.01)


def test_title_says_what_is_less():
    shape = shapes.SHAPES["Llama-3.2-3B"]
    title = shape.title(shape.size("cpu", depth=1, vocab=50, batch=4, tokens=210))
    assert title == "Llama-3.2-3B (1 of 28 layers, 50 of 128256 words), 4 x 210 tokens, bfloat16"
    assert "published: 4 x 210" in shape.title(shape.size("cpu", batch=1))
    assert shape.columns(shape.size("cpu", depth=3))["depth"] == "3/28"


def test_strategy_of_plain_pytorch():
    assert plain.cheapest(10, 100, 100, 100, torch.float32) == "factored"
    assert plain.cheapest(1000, 100, 100, 100, torch.float32) == "merged"
    assert plain.cheapest(1000, 100, 100, 100, torch.bfloat16) == "materialized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding(dtype):
    size = dataclasses.replace(SIZE, dtype=dtype)
    case = generate.Decoding(LLAMA, size, LLAMA.setting(size, rank=5), "cpu", new=4)
    for name in generate.PROVIDERS:
        if "compiled" in name or (dtype == torch.float32 and name.endswith("16-bit")):  # the former takes seconds
            continue
        tokens, logits, error = case.provider(name).run()
        assert tokens.shape == (2, 7 + 4) and logits.shape == (2, 4, 60), name
        assert 0 <= error < generate.TOLERANCE[dtype], name


def test_decoding_without_the_adapter_is_noticed(monkeypatch):
    def off(adapted):
        for pair in methods.pairs(adapted):
            pair.lam.data.zero_()

    monkeypatch.setitem(generate.PROVIDERS, "wrong", ("randlora", off))
    case = generate.Decoding(LLAMA, SIZE, LLAMA.setting(SIZE, rank=5), "cpu", new=4)
    with pytest.raises(AssertionError, match="logits"):
        case.provider("wrong")


def test_step_without_anything_to_train():
    case = training()
    run = step(LLAMA, methods.adapt(methods.FROZEN, case.model, case.setting), case.inputs)
    assert run().item() == run().item() and run.state() == []
