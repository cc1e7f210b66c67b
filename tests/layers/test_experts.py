"""randlora.Experts against the module's own forward, with weights that hold the updates by the formula in float64."""

import copy
import pickle

import pytest
import torch
from helpers.common import KINDS, assert_same_bits, over
from helpers.counted import SavedBytes
from helpers.experts_cases import (
    FORMS,
    HIDDEN,
    TOKENS,
    TOP_K,
    E,
    adapt,
    experts_of,
    families,
    inputs,
    own,
    parameters_of,
    random,
    reference,
    updates,
)
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.planner import STRATEGIES


def assert_equals_reference(layer, arguments, adapters=("default",), tolerance=1e-11):
    """Outputs, and the gradients of the tokens, of their weights and of all trained parameters."""
    y, expected = layer(*arguments), reference(layer, arguments, adapters)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert (expected - reference(layer, arguments, ())).abs().max() > 0.05, "the updates must matter"
    wanted = [arguments[0], arguments[2], *parameters_of(layer, adapters)]
    got, correct = (torch.autograd.grad(t.square().sum(), wanted) for t in (y, expected))
    for a, b in zip(got, correct, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@families
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_get_what_the_merged_module_gives(family, kind):
    layer = adapt(experts_of(family), kind=kind)
    for routing in ("even", "uneven", "one"):
        assert_equals_reference(layer, inputs(TOP_K[family], routing))


@families
def test_every_strategy_and_a_bound_on_temporaries(family):
    for strategy in STRATEGIES:
        layer = adapt(experts_of(family), strategy=strategy)
        for part in layer.adapted():
            part.workspace = 4096
        assert_equals_reference(layer, inputs(TOP_K[family]))


@pytest.mark.parametrize("form", FORMS)
def test_a_class_of_the_users_in_that_form(form):
    layer = adapt(own(**FORMS[form]))
    assert layer.adapted()[0].weight_name == ("gate_up_proj" if form.startswith("gate") else "up_proj")
    assert_equals_reference(layer, inputs(2))
    hidden, ids, weights = inputs(2)
    assert_same_bits(layer(hidden, top_k_weights=weights, top_k_index=ids), layer(hidden, ids, weights))


@pytest.mark.parametrize("names", [["gate_up_proj"], ["down_proj"]], ids=str)
def test_one_of_two_parameters(names):
    layer = adapt(experts_of("GptOss"), parameters=names)
    assert [part.weight_name for part in layer.adapted()] == names
    assert_equals_reference(layer, inputs(2))
    layer.add_adapter("b", ["down_proj"], r=2, randlora_alpha=4)
    random(layer, seed=5)
    assert_equals_reference(layer, inputs(2))
    for part in layer.adapted():
        part.set_adapter([name for name in ("default", "b") if name in part.randlora_lambda])
    both = [(part, name) for part in layer.adapted() for name in part.randlora_lambda]
    torch.testing.assert_close(layer(*inputs(2)), reference(layer, inputs(2), ("default", "b")), rtol=1e-11, atol=1e-11)
    assert len(both) == len(names) + 1


def test_what_other_ranks_compute_is_left_out():
    """Expert parallelism gives the index of no expert to what other ranks compute."""
    layer = adapt(experts_of("Mixtral"))
    hidden, ids, weights = inputs(2)
    ids[0, 1] = ids[3, 0] = ids[3, 1] = E
    assert_equals_reference(layer, (hidden, ids, weights))
    assert not layer(hidden, ids, weights)[3].any()


def test_nobody_has_tokens():
    layer = adapt(experts_of("Mixtral"))
    y = layer(*(t[:0] for t in inputs(2)))
    assert y.shape == (0, HIDDEN)
    y.sum().backward()
    assert all(not p.grad.any() and p.grad.shape == p.shape for p in parameters_of(layer))
    hidden, ids, weights = inputs(2)
    assert not layer(hidden, torch.full_like(ids, E), weights).any()


@families
@over("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_implementation_of_the_merged_module_gives_this(family, dtype):
    base = experts_of(family, dtype, even=True)
    layer = adapt(base)
    hidden, ids, weights = inputs(TOP_K[family], dtype=dtype)
    layer(hidden, ids, weights).sum().backward()
    double = copy.deepcopy(layer).double()
    double.zero_grad()
    double(hidden.detach().double(), ids, weights.detach().double()).sum().backward()
    for a, b in zip(parameters_of(layer), parameters_of(double), strict=True):
        torch.testing.assert_close(
            a.grad.double(), b.grad, rtol=0, atol=16 * torch.finfo(dtype).eps * b.grad.abs().max().item()
        )
    hidden, weights = hidden.detach(), weights.detach()
    y, exact = layer(hidden, ids, weights), reference(layer, (hidden.double(), ids, weights.double()))
    assert y.dtype == dtype
    size, error = exact.abs().max(), {}
    error["unmerged"] = (y.double() - exact).abs().max() / size
    before = copy.deepcopy(base.state_dict())
    for part in layer.adapted():
        merged = before[part.weight_name] + part.get_delta_weight("default")  # fp32
        part.merge(safe_merge=True)
        assert_same_bits(part.weight.detach(), merged.to(dtype))
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        base.config._experts_implementation = implementation
        error[implementation] = (layer(hidden, ids, weights).double() - exact).abs().max() / size
    base.config._experts_implementation = "eager"
    # Rounding alone: merging rounds the weight, too, so that unmerged is the most exact.
    assert max(error.values()) < 8 * torch.finfo(dtype).eps and error["unmerged"] <= 2 * min(error.values())
    for part in layer.adapted():
        part.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert_same_bits(layer(hidden, ids, weights), y)


def test_autocast():
    layer = adapt(experts_of("GptOss", torch.float32))
    arguments = inputs(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*arguments)
    assert y.dtype == torch.float32
    y.sum().backward()
    exact = layer(*arguments)
    assert 0 < (y - exact).abs().max() < 0.02 * exact.abs().max()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters_of(layer))


# ---- memory ----


@families
@over("dtype", [torch.float32, torch.bfloat16])
def test_each_part_keeps_its_tokens_and_nothing_else(family, dtype):
    """To the byte, beside what transformers keeps of the frozen module: the results of its products, and indices."""
    base = experts_of(family, dtype, even=True).requires_grad_(False)
    base.config._experts_implementation = "grouped_mm"
    arguments = inputs(TOP_K[family], dtype=dtype)
    with SavedBytes([*base.parameters(), *arguments]) as frozen:
        base(*arguments)
    rows, inner = TOP_K[family] * TOKENS, base.down_proj.shape[1 if base.is_transposed else 2]
    inputs_of = {"gate_up_proj": HIDDEN, "down_proj": inner}
    offsets = 4 * E  # grouped_mm's
    for kind in ("dense", "hadamard"):
        for names in (["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]):
            layer = adapt(base, kind=kind, parameters=names)
            known = [*layer.parameters(), *arguments]
            for part in layer.adapted():
                known += part.pattern("default") or part.bases["default"].tensors(dtype, arguments[0].device)
            with SavedBytes(known) as saved:
                layer(*arguments)
            assert saved.bytes == frozen.bytes - offsets + dtype.itemsize * rows * sum(map(inputs_of.get, names))


# ---- how training calls it ----


def test_checkpointing_and_compiling_change_nothing():
    layer = adapt(experts_of("Qwen3Moe"))
    arguments = inputs(3)

    def results(call):
        y = call(*arguments)
        return y, *torch.autograd.grad(y.square().sum(), [arguments[0], *parameters_of(layer)])

    expected = results(layer)
    for reentrant in (True, False):
        for p in (arguments[0], *parameters_of(layer)):
            p.grad = None
        y = checkpoint(layer, *arguments, use_reentrant=reentrant)
        y.square().sum().backward()
        got = y, arguments[0].grad, *(p.grad for p in parameters_of(layer))
        assert all(map(torch.equal, got, expected))

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = layer

        def forward(self, hidden, ids, weights):
            return self.experts(hidden * 1, ids, weights) * 1

    compiled = torch.compile(Around(), backend="eager")
    assert all(map(torch.equal, results(compiled), expected))
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable"):
        torch.compile(lambda *given: layer(*given), backend="eager", fullgraph=True)(*arguments)


def test_dropout_falls_on_the_updates_input_only():
    layer = adapt(experts_of("Mixtral"), parameters=["down_proj"], randlora_dropout=0.5).train()
    arguments = inputs(2)
    torch.manual_seed(0)
    several = torch.stack([layer(*arguments) for _ in range(400)]).detach()
    frozen, exact = reference(layer, arguments, ()), layer.eval()(*arguments)
    assert several.std(0).max() > 0
    torch.testing.assert_close(
        several.mean(0) - frozen, exact - frozen, rtol=0, atol=0.25 * (exact - frozen).abs().max().item()
    )


def test_copies_are_on_their_own():
    layer = adapt(experts_of("Mixtral"))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(twin(*inputs(2)), layer(*inputs(2)))
        twin.adapted()[0].merge()
        assert twin.adapted()[0].weight is twin.base_layer.gate_up_proj
        assert not layer.adapted()[0].merged
    assert layer.num_experts == E and layer.has_gate  # what else is asked is answered by the module


# ---- adapters ----


def test_adapters_come_go_and_are_switched():
    base = experts_of("GptOss")
    layer, arguments = adapt(base), inputs(2)
    first = layer(*arguments)
    layer.add_adapter("b", r=2, randlora_alpha=3)
    random(layer, seed=9)
    only = [part.randlora_lambda["default"].requires_grad for part in layer.adapted()]
    assert only == [True, True] and not any(p.requires_grad for p in parameters_of(layer, ["b"]))
    for part in layer.adapted():
        part.set_adapter("b")
    assert_equals_reference(layer, arguments, ("b",))
    for part in layer.adapted():
        part.merge()
        part.set_adapter(["b", "default"])
    torch.testing.assert_close(
        layer(*arguments), reference(layer, arguments, ["default"]), rtol=1e-11, atol=1e-11
    )  # b is in the weight, which the reference begins with
    for part in layer.adapted():
        part.enable_adapters(False)
    assert_same_bits(layer(*arguments), experts_of("GptOss")(*arguments))
    assert not any(part.merged for part in layer.adapted())
    for part in layer.adapted():
        part.enable_adapters(True)
        part.delete_adapter("b")
        part.reset_randlora_parameters("default")
        assert part.randlora_gamma["default"].flatten()[0] == 1 / max(part.randlora_gamma["default"].shape[1:])
    torch.testing.assert_close(layer(*arguments), experts_of("GptOss")(*arguments), rtol=1e-12, atol=1e-12)
    assert first.shape == arguments[0].shape


def test_shapes_names_and_matrices():
    layer = adapt(experts_of("Qwen3Moe"), num_bases=2)
    shapes = {name: list(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "base_layer.gate_up_proj": [E, 12, HIDDEN], "base_layer.down_proj": [E, HIDDEN, 6],
        "gate_up_proj.randlora_lambda.default": [E, 3, 2], "gate_up_proj.randlora_gamma.default": [E, 2, 12],
        "down_proj.randlora_lambda.default": [E, 3, 2], "down_proj.randlora_gamma.default": [E, 2, 6],
    }  # fmt: skip
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [n for n in shapes if "randlora" in n]
    for part in layer.adapted():
        dW = part.get_delta_weight("default")
        torch.testing.assert_close(dW, updates(part).detach(), rtol=1e-11, atol=1e-11)
        first, second = part.get_scaled_bases("default", expert=3)
        torch.testing.assert_close((second @ first) * part.scaling["default"], dW[3], rtol=1e-11, atol=1e-11)
        assert_same_bits(part.get_delta_weight("default", 3), dW[3])
    assert "5 experts" in repr(layer) and "kind=dense" in repr(layer)
    assert "one of 5 experts" in randlora.explain(layer.adapted()[0], 10)
    with pytest.raises(TypeError, match=r"got Experts: take one of those inside it, such as \w+_proj, down_proj"):
        randlora.explain(layer, 10)


# ---- what is refused ----


def refused():
    base = experts_of("Mixtral")

    class Derived(type(base)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    derived = Derived(base.config)
    parallel, hooked, low, shaped, replaced = (copy.deepcopy(base) for _ in range(5))
    parallel._is_expert_parallel = True
    hooked.register_forward_hook(lambda *_: None)
    low.gate_up_proj = torch.nn.Parameter(low.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    shaped.gate_up_proj = torch.nn.Parameter(shaped.gate_up_proj[:3])
    replaced.forward = lambda *_: None
    linear = torch.nn.Linear(3, 3)
    return [
        (derived, {}, TypeError, "no module of fused experts"),
        (linear, {}, TypeError, "a Linear is no module of fused experts that can be adapted: .*use_experts_impl"),
        (adapt(copy.deepcopy(base)), {}, TypeError, "adapted already"),
        (3, {}, TypeError, "got int"),
        (parallel, {}, ValueError, "spread over ranks by a parallel plan"),
        (hooked, {}, ValueError, "have hooks"),
        (replaced, {}, ValueError, "forward of their own"),
        (low, {}, TypeError, "float8_e4m3fn"),
        (shaped, {}, ValueError, r"with 5 experts .* got \[3, 42, 16\]"),
        (base, {"parameters": ["gate"]}, ValueError, "'gate' is no weight"),
        (base, {"parameters": "down_proj"}, ValueError, "is no weight|a list"),
        (base, {"parameters": []}, ValueError, "a list of some of"),
        (base, {"strategy": "fast"}, ValueError, "strategy must be one of"),
        (base, {"r": 0}, ValueError, "r must be"),
        (base, {"bases": 5}, TypeError, "bases must be"),
    ]


def test_what_cannot_be_adapted_says_why_and_stays_as_it_was():
    for base, settings, error, match in refused():
        module = base if isinstance(base, torch.nn.Module) else torch.nn.Module()
        flags = [p.requires_grad for p in module.parameters()]
        with pytest.raises(error, match=match):
            randlora.Experts(base, **{"r": 3} | settings)
        assert [p.requires_grad for p in module.parameters()] == flags


def test_calls_that_cannot_be_right_are_refused():
    layer = adapt(experts_of("Mixtral"))
    hidden, ids, weights = inputs(2)
    with pytest.raises(TypeError, match="got 2 arguments"):
        layer(hidden, ids)
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        layer.add_adapter("default", r=3)
    with pytest.raises(ValueError, match="r must be"):
        layer.add_adapter("b", r=-1)
    assert all("b" not in part.randlora_lambda for part in layer.adapted())
    layer.base_layer.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="have hooks"):
        layer(hidden, ids, weights)
    layer.base_layer._forward_pre_hooks.clear()
    layer.base_layer.down_proj = torch.nn.Parameter(layer.base_layer.down_proj[:, :4])
    with pytest.raises(ValueError, match=r"shape that was adapted, \[5, 16, 21\], got \[5, 4, 21\]"):
        layer(hidden, ids, weights)
    with pytest.raises(ValueError, match=r"must have shape \[5, 16, 21\]"):
        layer.adapted()[1].merge()
    layer = adapt(experts_of("Mixtral"))
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="gate_up_proj is on the meta device"):
        layer(hidden, ids, weights)
    with torch.no_grad():
        layer = adapt(experts_of("Mixtral"))
        layer.adapted()[0].randlora_lambda["default"][2] = torch.nan
        before = layer.base_layer.gate_up_proj.clone()
        with pytest.raises(ValueError, match="NaN or infinity"):
            layer.adapted()[0].merge(safe_merge=True)
        assert torch.equal(layer.base_layer.gate_up_proj, before)
