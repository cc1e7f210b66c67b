"""What fails in the middle leaves the model as it was, wherever it fails, and succeeds the next time."""

import copy
import random
from collections import OrderedDict

import pytest
import torch
from helpers.common import make_base, make_layer
from helpers.failing import calls_of, fail_at
from helpers.models import IDS, adapt, add, assert_computes, assert_unchanged, merged_by_hand, net, randomize, snapshot
from torch import nn

import randlora
from randlora import RandLoraConfig, RandLoraModel

EVERYTHING = {"r": 3, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["head"], "bias": "all"}


def state(model):
    """All of a model: :func:`snapshot`, the very objects that it is made of, and what its layers know."""
    objects = {name: (module, dict(module._parameters)) for name, module in model.named_modules()}
    plain = (bool, int, float, str, list, tuple, dict, type(None), torch.Tensor)
    known = {
        name: {
            key: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v)
            for key, v in vars(module).items()
            if type(v) in plain and not key.endswith("_hooks")
        }
        for name, module in model.named_modules()
    }
    for attributes in known.values():
        for key in ("_parameters", "_modules", "_buffers"):
            attributes.pop(key)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    return snapshot(model), objects, known, hooks


def assert_same_state(model, before):
    assert_unchanged(model, before[0])
    _, objects, known, hooks = state(model)
    assert objects.keys() == before[1].keys()
    for name, (module, parameters) in before[1].items():
        assert objects[name][0] is module and objects[name][1].keys() == parameters.keys(), name
        assert all(objects[name][1][key] is parameter for key, parameter in parameters.items()), name
    for name, attributes in before[2].items():
        assert known[name].keys() == attributes.keys()
        for key, value in attributes.items():
            now = known[name][key]
            if isinstance(value, torch.Tensor):
                assert isinstance(now, torch.Tensor) and torch.equal(now, value), (name, key)
            else:
                assert repr(now) == repr(value), (name, key)
    assert hooks == before[3]


def two():
    return add(adapt(net(), modules_to_save=["head"]), "b", 2, r=3, bias="all")


def merged():
    model = two()
    model.merge_adapter(["b"])
    return model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x):
        return self.block(x)


def attention():
    torch.manual_seed(0)
    return Attention().double().eval()


# name -> (makes what it works on, the operation)
OPERATIONS = {
    "get_peft_model": (net, lambda m, _: randlora.get_peft_model(m, RandLoraConfig(**EVERYTHING))),
    "get_peft_model_attention": (
        attention, lambda m, _: randlora.get_peft_model(m, {"r": 3, "target_modules": ["self_attn", "linear1"]})
    ),
    "add_adapter": (lambda: adapt(net()), lambda m, _: m.add_adapter("b", RandLoraConfig(**EVERYTHING))),
    "set_adapter": (two, lambda m, _: m.set_adapter("b")),
    "set_adapter_merged": (merged, lambda m, _: m.set_adapter("default")),
    "set_requires_grad": (two, lambda m, _: m.set_requires_grad(["default", "b"], False)),
    "disable": (two, lambda m, _: m.disable_adapter_layers()),
    "delete_adapter": (two, lambda m, _: m.delete_adapter("default")),
    "add_weighted_adapter": (lambda: adapt(net()), lambda m, _: m.add_weighted_adapter(["default"], [2.0], "b")),
    "merge_adapter": (two, lambda m, _: m.merge_adapter(["default", "b"])),
    "merge_one_more": (merged, lambda m, _: m.merge_adapter(["default"], safe_merge=True)),
    "unmerge_adapter": (merged, lambda m, _: m.unmerge_adapter()),
    "merge_and_unload": (two, lambda m, _: m.merge_and_unload()),
    "merge_and_unload_attention": (
        lambda: randomize(
            randlora.get_peft_model(attention(), {"r": 3, "target_modules": ["self_attn", "linear1"]}),
        ),
        lambda m, _: m.merge_and_unload(safe_merge=True),
    ),
    "unload": (merged, lambda m, _: m.unload()),
    "from_pretrained": (net, lambda m, path: RandLoraModel.from_pretrained(m, path)),
    "load_adapter": (lambda: adapt(net()), lambda m, path: m.load_adapter(path, "b")),
    "Linear": (lambda: make_base(5, 7), lambda m, _: randlora.Linear(m, r=2)),
    "update_layer": (make_layer, lambda m, _: m.update_layer("b", r=2)),
    "layer.delete_adapter": (make_layer, lambda m, _: m.delete_adapter("default")),
    "layer.merge": (make_layer, lambda m, _: m.merge()),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2), lambda m, _: randlora.MultiheadAttention(m, r=2)
    ),
    "attention.add_adapter": (
        lambda: randlora.MultiheadAttention(nn.MultiheadAttention(8, 2), r=2, projections=["q_proj"]),
        lambda m, _: m.add_adapter("b", r=3),
    ),
}  # fmt: skip
TRIES = 12


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_failing_anywhere(name, tmp_path):
    make, operation = OPERATIONS[name]
    source = adapt(net(), **EVERYTHING)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    source.save_pretrained(tmp_path)
    operation(make(), tmp_path)  # imports and caches
    expected = make()
    total = calls_of(operation, expected, tmp_path)
    model = make()
    before = state(model)
    failed = 0
    for k in sorted(random.Random(0).sample(range(1, total), min(TRIES, total - 1))):
        if failure := fail_at(k, operation, model, tmp_path):
            failed += 1
            print("failed in", failure)
            assert_same_state(model, before)
        else:  # later runs make a few calls less
            model = make()
            before = state(model)
    assert failed > 0.5 * min(TRIES, total - 1)
    operation(model, tmp_path)
    assert state(model)[0][1:3] == state(expected)[0][1:3]


def test_memory_runs_out_in_add_adapter(monkeypatch):
    model = adapt(net())
    before, empty = state(model), torch.randn
    made = []

    def no_more(*arguments, **settings):
        made.append(arguments)
        if len(made) == 5:
            raise MemoryError
        return empty(*arguments, **settings)

    monkeypatch.setattr(torch, "randn", no_more)
    with pytest.raises(MemoryError):
        model.add_adapter("b", RandLoraConfig(r=3, target_modules="all-linear"))
    assert_same_state(model, before)
    add(model, "b", 2, r=3, target_modules="all-linear")  # the name is not taken
    model.set_adapter("b")
    assert_computes(model, ["b"])


def failing_at(monkeypatch, model, method, count):
    """The `count`-th call of `method` of the model's layers, in all, raises."""
    made, original = [], getattr(randlora.Linear, method)

    def fails(*arguments, **settings):
        made.append(arguments)
        if len(made) == count:
            raise MemoryError
        return original(*arguments, **settings)

    monkeypatch.setattr(randlora.Linear, method, fails)


def test_memory_runs_out_in_merge_and_unload(monkeypatch):
    model = adapt(net(torch.bfloat16))
    before = state(model)
    failing_at(monkeypatch, model, "get_delta_weight", 5)
    with pytest.raises(MemoryError):
        model.merge_and_unload()
    assert_same_state(model, before)
    assert torch.equal(model.merge_and_unload()(IDS), adapt(net(torch.bfloat16)).merge_and_unload()(IDS))


@pytest.mark.filterwarnings("ignore:set_adapter")
def test_low_memory_goes_on_where_it_was(monkeypatch):
    model = adapt(net())
    add(model, "b", 2)
    expected = merged_by_hand(net(), model, ["default"])(IDS)
    failing_at(monkeypatch, model, "get_delta_weight", 5)
    with pytest.raises(MemoryError):
        model.merge_and_unload(low_memory=True)
    torch.testing.assert_close(model(IDS), expected)
    first, *_, last = randlora.model.parts.adapted_layers(model.model).values()
    assert first.merged and first._unmerged_weight is None and not last.merged
    for call in (model.unmerge_adapter, model.unload, lambda: model.set_adapter("b")):
        before = state(model)
        with pytest.raises(ValueError, match="was not kept"):
            call()
        assert_same_state(model, before)
    torch.testing.assert_close(model.merge_and_unload(low_memory=True)(IDS), expected)


@pytest.mark.parametrize("name", ["r", "num_bases"])
def test_sizes_beyond_reason(name):
    model = adapt(net())
    before = state(model)
    for value in (2**16 + 1, 2**63, 10**30):
        settings = {"r": 2, "target_modules": ["q_proj"]} | {name: value}
        for call in (
            lambda settings=settings: model.add_adapter("b", settings),
            lambda settings=settings: RandLoraConfig(**settings),
            lambda value=value: randlora.Linear(nn.Linear(3, 4), **{name: value}),
        ):
            with pytest.raises(ValueError, match=f"{name} must be at most 65536, got {value}"):
                call()
    with pytest.raises(ValueError, match="must be at most"):
        randlora.RandomBases(**{"max_dim": 4, "min_dim": 3, "r": 2} | {name: 10**30})
    assert_same_state(model, before)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_numbers(sizes):
    with pytest.raises(ValueError, match="there is nothing to adapt"):
        randlora.Linear(nn.Linear(*sizes))
    model = nn.Sequential(OrderedDict(empty=nn.Linear(*sizes), other=nn.Linear(3, 3)))
    before = state(model)
    with pytest.raises(ValueError, match=r"'empty', a Linear with \(in, out\) = .* exclude_modules leaves it out"):
        randlora.get_peft_model(model, {"r": 2, "target_modules": ["empty", "other"]})
    assert_same_state(model, before)
    adapted = randlora.get_peft_model(model, {"r": 2, "target_modules": "all-linear"})
    assert list(randlora.model.parts.adapted_layers(adapted.model)) == ["other"]
    with pytest.raises(ValueError, match="matches no layer"):
        randlora.get_peft_model(nn.Sequential(nn.Linear(*sizes)), {"r": 2, "target_modules": "all-linear"})
