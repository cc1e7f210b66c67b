"""A batch of mixed adapters: every sample computes what it would with its own adapter alone."""

import copy

import pytest
import torch
from helpers.common import normal
from helpers.models import IDS, adapt, add, assert_unchanged, layers_of, merged_by_hand, net, snapshot, tiny_llama
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

NAMES = ["b", "__base__", "default", "c"]


def three(model=None, double=True, third="sign", **settings):
    """Adapters of other ranks, kinds and layers; `third` is the kind of one that all layers have."""
    model = adapt(net() if model is None else model, **settings)
    add(model, "b", 2, r=3, kind="sparse", randlora_alpha=5, target_modules=["q_proj", "up_proj"])
    add(model, "c", 3, r=20, kind=third, projection_prng_key=4, target_modules="all-linear")
    return model


def each_alone(model, call):
    """``call(model, i)`` for every sample i with its own adapter."""
    results = []
    for i, name in enumerate(NAMES):
        model.set_adapter([] if name == "__base__" else name)
        results.append(call(model, i))
    model.set_adapter("default")
    return results


# ---- parity ----


@pytest.mark.parametrize("third", ["sign", "hadamard"])
def test_forward(third):
    model = three(third=third)
    got = model(IDS, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        exact = merged_by_hand(net(), model, [] if name == "__base__" else [name])
        assert_close(got[i : i + 1], exact(IDS[i : i + 1]), rtol=1e-11, atol=1e-11)
    assert torch.equal(got[1], net()(IDS)[1])
    assert model.active_adapters == ["default"]
    with torch.no_grad():
        assert_close(model.eval()(IDS, adapter_names=NAMES), got)


def test_the_active_adapters_do_not_matter():
    model = three()
    expected = model(IDS, adapter_names=NAMES)
    for active in ([], "c", ["default", "b"]):
        model.set_adapter(active)
        assert torch.equal(model(IDS, adapter_names=NAMES), expected)
    assert torch.equal(model(IDS, adapter_names=["__base__"] * 4), net()(IDS))
    assert torch.equal(model(IDS, adapter_names=tuple(NAMES)), expected)


def test_gradients():
    model = three().train()
    model.set_adapter(["default", "b", "c"])
    model(IDS, adapter_names=NAMES).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
            model(IDS[i : i + 1]).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() == {n for n, _ in model.named_parameters() if "randlora_" in n}
    for name, gradient in expected.items():
        assert_close(got[name], gradient, rtol=1e-10, atol=1e-10)


def test_only_active_adapters_are_trained():
    model = three().train()
    model(IDS, adapter_names=NAMES).square().sum().backward()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"default"}


GENERATE = {
    "greedy": {}, "beams": {"num_beams": 3}, "sequences": {"num_beams": 4, "num_return_sequences": 2},
    "no_cache": {"use_cache": False}, "static_cache": {"cache_implementation": "static"},
}  # fmt: skip


@pytest.mark.parametrize("settings", GENERATE.values(), ids=GENERATE)
def test_generate(settings):
    model = three(tiny_llama().double(), randlora_alpha=30)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    got = model.generate(IDS, adapter_names=NAMES, **settings)
    assert torch.equal(got, torch.cat(each_alone(model, lambda m, i: m.generate(IDS[i : i + 1], **settings))))
    assert not torch.equal(got, model.generate(IDS, **settings))


def test_encoder_and_decoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=19, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    targets = {"default": ["q", "v", "wi"], "b": ["k", "wo"], "c": "all-linear"}
    model = adapt(transformers.T5ForConditionalGeneration(config).eval().double(), target_modules=targets["default"])
    for i, name in enumerate(("b", "c")):
        add(model, name, 2 + i, r=3, target_modules=targets[name])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    got = model.generate(input_ids=IDS, adapter_names=NAMES, **settings)
    assert torch.equal(got, torch.cat(each_alone(model, lambda m, i: m.generate(input_ids=IDS[i : i + 1], **settings))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision(dtype):
    model = three(net(dtype))
    got = model(IDS, adapter_names=NAMES)
    assert got.dtype == dtype
    for i, name in enumerate(NAMES):
        plain = merged_by_hand(net(dtype), model, [] if name == "__base__" else [name])
        exact, rounded = plain(IDS[i : i + 1]), copy.deepcopy(plain).to(dtype)(IDS[i : i + 1])
        floor = exact.abs().max() * torch.finfo(dtype).eps
        assert (got[i : i + 1].double() - exact).norm() <= 2 * (rounded.double() - exact).norm() + floor


def test_dropout_is_each_adapters_own():
    model = three(randlora_dropout=0.5).train()
    first, second = (model(IDS, adapter_names=NAMES) for _ in range(2))
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert same == [True, True, False, True]


def test_modules_to_save():
    model = three(modules_to_save=["embed"])
    with torch.no_grad():
        model.model.embed.modules_to_save["default"].weight.mul_(-1)
    got = model(IDS, adapter_names=NAMES)
    assert_close(got, torch.cat(each_alone(model, lambda m, i: m(IDS[i : i + 1]))))
    got.square().sum().backward()
    assert model.model.embed.modules_to_save["default"].weight.grad is not None


class Headed(nn.Module):
    def __init__(self, head, before=lambda x: x, keyword=None):
        super().__init__()
        self.up, self.head, self.before, self.keyword = nn.Linear(6, 6), head, before, keyword

    def forward(self, x):
        x = self.before(torch.tanh(self.up(x)))
        return self.head(x) if self.keyword is None else self.head(**{self.keyword: x})


HEADS = {
    "pooled": lambda: Headed(nn.Linear(6, 3), lambda x: x.mean(1)),
    "keyword": lambda: Headed(nn.Linear(6, 3), keyword="input"),
    "conv": lambda: Headed(nn.Conv1d(6, 3, 2), lambda x: x.transpose(1, 2)),
    "deep": lambda: Headed(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_to_save(head):
    model = adapt(HEADS[head]().double(), target_modules=["up"], modules_to_save=["head"])
    for i, name in enumerate(("b", "c")):
        add(model, name, 2 + i, r=3, target_modules=["up"], modules_to_save=["head"] if name == "b" else None)
    with torch.no_grad():
        for i, name in enumerate(("default", "b")):
            for parameter in model.model.head.modules_to_save[name].parameters():
                parameter.copy_(normal(*parameter.shape, seed=i, dtype=torch.float64))
    x = normal(4, 5, 6, dtype=torch.float64)
    expected = torch.cat(each_alone(model, lambda m, i: m(x[i : i + 1])))
    for active in ("default", "b", "c", []):
        model.set_adapter(active)
        assert_close(model(x, adapter_names=NAMES), expected)


def test_base_product_is_computed_once():
    model = three()
    calls = []
    for layer in layers_of(model).values():
        layer.base_layer.register_forward_hook(lambda module, args, out: calls.append(out.shape[0]))
    model(IDS, adapter_names=NAMES)
    assert calls == [len(IDS)] * len(layers_of(model))


def test_torch_compile():
    model = adapt(nn.Sequential(nn.Linear(6, 6)), target_modules=["0"])
    compiled, x = torch.compile(model, backend="eager"), normal(3, 6)
    for names in (["default", "__base__", "default"], ["__base__", "default", "default"]):
        assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names))


# ---- telling samples apart ----


class Flat(nn.Module):
    """As some models do, ``[B * T, features]`` goes through its layers, and a pooled ``[B, features]``."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.pool = nn.Embedding(19, 6), nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, mask=None, ids=None):
        flat = torch.tanh(self.up(self.embed(ids).flatten(0, 1)))
        return self.pool(flat.view(*ids.shape, -1).mean(1))


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_flattened_tokens(tokens):
    model = adapt(Flat().double(), target_modules="all-linear")
    names, ids = ["default", "__base__", "default", "__base__"], IDS[:, :1].repeat(1, tokens)
    got = model(ids=ids, adapter_names=names)
    assert_close(got[::2], model(ids=ids)[::2])
    with model.disable_adapter():
        assert_close(got[1::2], model(ids=ids)[1::2])


def test_inputs_before_other_tensors():
    """Positions come with a first dimension of 1."""
    model = adapt(tiny_llama())
    names = ["default", "__base__"] * 2
    got = model(position_ids=torch.arange(IDS.shape[1])[None], input_ids=IDS, adapter_names=names).logits
    assert torch.equal(got, model(IDS, adapter_names=names).logits)


class LengthFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.up = nn.MultiheadAttention(6, 2), nn.Linear(6, 6)

    def forward(self, x):
        x = x.transpose(0, 1)
        return (x + self.up(self.attn(x, x, x, need_weights=False)[0])).transpose(0, 1)


def test_length_first():
    names = ["default", "__base__", "default"]
    model = adapt(LengthFirst().double(), target_modules=["attn"])
    for length in (3, 5):  # 3: as long as the batch
        x = normal(3, length, 6, dtype=torch.float64)
        got = model(x, adapter_names=names)
        assert_close(got[::2], model(x)[::2])
        with model.disable_adapter():
            assert_close(got[1], model(x)[1])
    model = adapt(LengthFirst().double(), target_modules=["up"])
    with pytest.raises(ValueError, match="cannot be known which dimension is the batch"):
        model(normal(3, 3, 6, dtype=torch.float64), adapter_names=names)
    with pytest.raises(ValueError, match="does not keep the batch as the first dimension"):
        model(normal(3, 5, 6, dtype=torch.float64), adapter_names=names)


def test_experts_are_refused():
    """They get as many rows as tokens are routed to them, which may happen to be the number of samples."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x):
            return torch.cat([self.experts[0](x.flatten(0, 1)[:3]), self.experts[1](x.flatten(0, 1)[3:])])

    with pytest.raises(ValueError, match="routed to them"):
        adapt(Experts(), target_modules=["0"])(torch.zeros(3, 4, 6), adapter_names=["default", "__base__", "default"])


# ---- what is refused ----

ERRORS = {
    "unknown": (["defualt", "b", "b", "b"], ValueError, "'__base__' or one of b, c, default, got defualt"),
    "string": ("default", TypeError, "a list of names, one per sample"),
    "no_strings": ([1, 2, 3, 4], TypeError, "a list of names"),
    "empty": ([], ValueError, "got an empty list"),
    "too_few": (NAMES[:3], ValueError, r"got 3 names for an input of shape \[4, 5\]"),
    "too_many": ([*NAMES, "b"], ValueError, "got 5 names"),
    "half": (NAMES[:2], ValueError, "got 2 names"),  # only generate repeats samples
}


@pytest.mark.parametrize(("names", "error", "named"), ERRORS.values(), ids=ERRORS)
def test_bad_names(names, error, named):
    model = three()
    before, hooks = snapshot(model), len(model.model._forward_pre_hooks)
    with pytest.raises(error, match=named):
        model(IDS, adapter_names=names)
    assert_unchanged(model, before)
    assert len(model.model._forward_pre_hooks) == hooks
    assert all(layer.mixed_batch is None for layer in layers_of(model).values())


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_beams": 4}], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_generate_with_the_wrong_length(count, settings):
    """Only the copies of samples that generate makes share a name."""
    model = three(tiny_llama())
    model.model.generation_config.update(**settings)
    with pytest.raises(ValueError, match=f"got {count} names"):
        model.generate(IDS, adapter_names=(NAMES * 2)[:count], max_new_tokens=2)
    with pytest.raises(ValueError, match=f"got {count} names"):
        model(IDS, adapter_names=(NAMES * 2)[:count])
    assert not any("_expand_inputs_for_generation" in vars(module) for module in model.modules())


def test_merged_and_disabled():
    model = three()
    with model.disable_adapter():
        assert torch.equal(model(IDS, adapter_names=NAMES), net()(IDS))
    model.merge_adapter("b")
    with pytest.raises(ValueError, match="while adapters are merged: call unmerge_adapter"):
        model(IDS, adapter_names=NAMES)


def test_gradient_checkpointing_in_training():
    model = three(tiny_llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="cannot be used with gradient checkpointing in training"):
        model(IDS, adapter_names=NAMES)
    with torch.no_grad():
        model(IDS, adapter_names=NAMES)
    model.eval()(IDS, adapter_names=NAMES)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_models_own_checkpointing(reentrant):
    """It would run the layers again in backward, when the names are forgotten: silently with other adapters."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=reentrant))

    model = adapt(Checkpointed(), target_modules="all-linear")
    x = torch.ones(2, 3, 6, requires_grad=True)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(x, adapter_names=["default", "__base__"])
    with torch.no_grad():
        model(x, adapter_names=["default", "__base__"])
