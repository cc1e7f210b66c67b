"""What `estimate` tells, held against models that are adapted, run and saved."""

import pytest
import torch
from helpers.checkpoints import CONFIG, WEIGHTS
from helpers.common import KINDS, normal
from helpers.counted import SavedBytes, multiply_adds
from helpers.estimates import TARGETS, TOKENS, config
from helpers.models import IDS, net, tiny_gpt2, tiny_llama
from torch import nn

import randlora
from randlora import RandLoraConfig, RandomBases, estimate, planner
from randlora.model.parts import adapted_layers


class Chain(nn.Module):
    """Blocks whose q, k and v share an input that nothing else keeps; wide, tall and square layers."""

    def __init__(self, d=24, hidden=40, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(d, hidden, bias=False), "k": nn.Linear(d, hidden, bias=False),
                           "v": nn.Linear(d, d, bias=False), "o": nn.Linear(hidden, d, bias=False)})
            for _ in range(blocks)
        )  # fmt: skip

    def forward(self, x):
        for block in self.blocks:
            x = block["o"](block["q"](x) + block["k"](x)) + block["v"](x)
        return x


CHAIN = ["q", "k", "v", "o"]


def adapted(model, settings):
    """The model with bases of its own, so that other tests' do not count."""
    model = randlora.get_peft_model(model, settings)
    bases = next(iter(adapted_layers(model.model).values())).bases["default"]
    own = RandomBases(bases.max_dim, bases.min_dim, bases.r, bases.kind, 7, bases.num_bases,
                      sparsity=bases.sparsity if "sparse" in bases.kind else None)  # fmt: skip
    for layer in adapted_layers(model.model).values():
        layer.bases["default"] = own
        nn.init.normal_(layer.randlora_lambda["default"])
        nn.init.normal_(layer.randlora_gamma["default"])
    return model, own


# ---- trained numbers, files ----


@pytest.mark.parametrize("settings", [
    {}, {"r": 5, "target_modules": "all-linear"}, {"num_bases": 2}, {"bias": "all"}, {"bias": "randlora_only"},
    {"modules_to_save": ["head"]}, {"layers_to_transform": [1], "kind": "sign"}, {"prng": "peft"},
    {"save_projection": False}, {"kind": "sparse", "sparsity": 7.0},
], ids=str)  # fmt: skip
def test_trained_numbers_and_files_are_those_of_the_adapted_model(settings, tmp_path):
    result = estimate(net(torch.float32), config(**settings), TOKENS, inputs=IDS)
    told = result["methods"][result["kind"]]
    model = randlora.get_peft_model(net(torch.float32), config(**settings))
    assert told["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    assert told["optimizer_bytes"] == 2 * 4 * told["trainable_parameters"]
    assert result["layers"] == len(adapted_layers(model.model))
    model.save_pretrained(tmp_path)
    real = sum((tmp_path / name).stat().st_size for name in (CONFIG, WEIGHTS))
    assert told["file_bytes"] == pytest.approx(real, rel=0.02, abs=400)
    model.peft_config["default"].save_projection = False
    model.save_pretrained(tmp_path)
    real = sum((tmp_path / name).stat().st_size for name in (CONFIG, WEIGHTS))
    assert told["file_bytes_without_projections"] == pytest.approx(real, rel=0.02, abs=400)


# ---- bases ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bases_take_what_they_are_said_to(kind, dtype):
    model = nn.Sequential(nn.Linear(200, 330), nn.Linear(330, 121)).to(dtype)
    x = torch.randn(9, 200, dtype=dtype)
    settings = {"r": 16, "kind": kind, "target_modules": "all-linear"}
    told = estimate(model, settings, 9, inputs=x)["methods"][kind]
    model, bases = adapted(model, settings)
    model(x).sum().backward()
    if told["bases_form"] == "dense":
        assert told["bases_bytes"] == bases.nbytes
    else:
        assert told["bases_bytes"] == pytest.approx(bases.nbytes, rel=0.03) and bases.nbytes > 0
    assert told["bases_form"] == next(
        (held.name for held, _ in bases.copies.packed.values()), "dense"
    )  # fmt: skip


def test_bases_that_are_not_kept():
    """They are part of the workspace, for the layer that takes most; nothing else is another."""
    kept, made = (
        estimate(net(torch.float32), config(), TOKENS, inputs=IDS, keep_bases=keep)["methods"] for keep in (True, False)
    )
    was, now = kept.pop("dense"), made.pop("dense")
    assert made == kept
    assert (now["bases_bytes"], now["bases_form"]) == (0, "seed")
    n, r = now["shapes"][0]["num_bases"], config().r
    assert 0 < now["workspace_bytes"] - was["workspace_bytes"] <= 4 * n * r * 22
    others = was.keys() - {"bases_bytes", "bases_form", "workspace_bytes"}
    assert {key: was[key] for key in others} == {key: now[key] for key in others}
    with_peft = estimate(net(torch.float32), config(prng="peft"), TOKENS, inputs=IDS, keep_bases=False)
    assert with_peft["methods"]["dense"]["bases_form"] == "dense"


@pytest.mark.parametrize("sparsity", [1.0, 2.0, 3.0, 9.0, 20.0, 50.0])
def test_bases_of_any_sparsity(sparsity):
    model = nn.Sequential(nn.Linear(250, 330))
    settings = {"r": 8, "kind": "sparse", "sparsity": sparsity, "target_modules": "all-linear"}
    told = estimate(model, settings, 9)["methods"]["sparse"]
    model, bases = adapted(model, settings)
    bases.pattern(250)
    assert told["bases_bytes"] == pytest.approx(bases.nbytes, rel=0.05)


def test_lists_beside_a_forced_factored_strategy_are_dense_too():
    model = nn.Sequential(nn.Linear(200, 200))
    settings = {"r": 16, "kind": "very_sparse", "target_modules": "all-linear", "strategy": "factored"}
    told = estimate(model, settings, 9)["methods"]["very_sparse"]
    model, bases = adapted(model, settings)
    model(torch.randn(9, 200)).sum().backward()
    assert told["bases_bytes"] == pytest.approx(bases.nbytes, rel=0.05)


# ---- a step ----


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_of_a_chain(dtype, requires_grad, dropout):
    x = torch.randn(30, 24, dtype=dtype).requires_grad_(requires_grad)
    settings = RandLoraConfig(r=4, target_modules=CHAIN, randlora_dropout=dropout)
    told = estimate(Chain().to(dtype), settings, 30, inputs=x)
    model, bases = adapted(Chain().to(dtype), settings)
    with SavedBytes([*model.parameters(), *bases.tensors(dtype)]) as saved:
        model(x)
    assert told["inputs"] == "counted"
    assert told["methods"]["dense"]["saved_bytes"] == saved.bytes
    assert told["methods"]["dense"]["saved_bytes"] == 2 * 30 * (24 + 40) * dtype.itemsize


@pytest.mark.parametrize("make, targets", [
    (lambda: net(torch.float32), TARGETS), (tiny_llama, ["q_proj", "v_proj"]), (tiny_llama, "all-linear"),
    (tiny_gpt2, "all-linear"),
], ids=["net", "llama", "llama-all", "gpt2"])  # fmt: skip
def test_saved_bytes_of_models_are_what_comes_to_those_of_the_frozen_one(make, targets):
    settings = {"r": 4, "target_modules": targets}
    given = {} if hasattr(make(), "config") else {"inputs": IDS}
    told = estimate(make(), settings, TOKENS, **given)
    assert told["inputs"] == "counted"

    frozen = make().requires_grad_(False).train()
    layers = [m for m in frozen.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    layers[0].register_forward_hook(lambda layer, args, y: y.requires_grad_())  # where the adapter's gradients begin
    with SavedBytes(frozen.state_dict(keep_vars=True).values()) as before:
        frozen(IDS)
    model, bases = adapted(make(), settings)
    with SavedBytes([*model.state_dict(keep_vars=True).values(), *bases.tensors()]) as after:
        model.train()(IDS)
    assert told["methods"]["dense"]["saved_bytes"] == pytest.approx(after.bytes - before.bytes, rel=0.02)


@pytest.mark.parametrize("strategy", ["auto", *planner.STRATEGIES])
@pytest.mark.parametrize("tokens", [7, 120])
def test_operations_are_those_of_the_products_that_run(strategy, tokens):
    settings = RandLoraConfig(r=4, target_modules=CHAIN, strategy=strategy)
    told = estimate(Chain(), settings, tokens, inputs=torch.zeros(tokens, 24))["methods"]["dense"]
    frozen, (model, _) = Chain().requires_grad_(False), adapted(Chain(), settings)
    x = normal(tokens, 24)
    with torch.profiler.profile(record_shapes=True) as forward_with_adapter:
        loss = model(x).sum()
    with torch.profiler.profile(record_shapes=True) as backward_with_adapter:
        loss.backward()
    # As in the adapted model, the first block's gradients end at its own layers.
    for name in ("q", "k", "v"):
        frozen.blocks[0][name].register_forward_hook(lambda layer, args, y: y.requires_grad_())
    with torch.profiler.profile(record_shapes=True) as forward:
        loss = frozen(x).sum()
    with torch.profiler.profile(record_shapes=True) as backward:
        loss.backward()
    in_forward = multiply_adds(forward_with_adapter) - multiply_adds(forward)
    assert told["forward_multiply_adds"] == in_forward
    assert told["multiply_adds"] == in_forward + multiply_adds(backward_with_adapter) - multiply_adds(backward)
    assert {row["input_gradient"] for row in told["shapes"]} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
# Tokens in number such that no two strategies are close: the sizes of lists are expected ones here, random ones there.
@pytest.mark.parametrize("tokens, dropout", [(3, 0.0), (50, 0.0), (50, 0.1), (600, 0.0)])
def test_strategies_are_those_that_a_step_takes(kind, tokens, dropout, monkeypatch):
    settings = RandLoraConfig(r=16, kind=kind, target_modules="all-linear", randlora_dropout=dropout)
    make = lambda: nn.Sequential(nn.Linear(150, 220), nn.Linear(220, 130), nn.Linear(130, 130))  # noqa: E731
    x = torch.randn(tokens, 150)
    told = estimate(make(), settings, tokens, inputs=x)["methods"][kind]["shapes"]
    model, _ = adapted(make(), settings)
    taken, plan = [], planner.plan

    def for_tokens(parts):
        """Of a plan such as "factored<340,merged"."""
        named = (part.partition("<") for part in parts.split(","))
        return next(name for name, _, limit in named if not limit or tokens < int(limit))

    def spy(*args, **kwargs):
        found = plan(*args, **kwargs)
        taken.append((*args[:3], *map(for_tokens, found)))
        return found

    monkeypatch.setattr(planner, "remembered_plan", spy)
    model(x)
    assert [(r["in_features"], r["out_features"], r["num_bases"], r["forward"], r["backward"]) for r in told] == taken


def test_a_layer_that_is_called_several_times_counts_each_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    x = torch.zeros(5, 12, requires_grad=True)
    once = estimate(Twice(), config(target_modules=["layer"]), 5)["methods"]["dense"]
    twice = estimate(Twice(), config(target_modules=["layer"]), 5, inputs=x)["methods"]["dense"]
    assert twice["multiply_adds"] == 2 * once["multiply_adds"]
    assert [row["count"] for row in twice["shapes"]] == [2]
    assert twice["trainable_parameters"] == once["trainable_parameters"]
    assert twice["saved_bytes"] == once["saved_bytes"]  # tanh keeps the second input anyway


def test_autocast_computes_in_its_dtype_and_keeps_the_input_as_it_came():
    x = torch.zeros(30, 24, requires_grad=True)
    settings = RandLoraConfig(r=4, target_modules=CHAIN)
    told = estimate(Chain(), settings, 30, inputs=x, autocast=torch.bfloat16)
    assert told["dtype"] == "bfloat16"
    dense, full = told["methods"]["dense"], estimate(Chain(), settings, 30, inputs=x)["methods"]["dense"]
    assert dense["bases_bytes"] == full["bases_bytes"] / 2 and dense["saved_bytes"] == full["saved_bytes"]
    assert all("merged" not in (r["forward"], r["backward"]) for r in dense["shapes"])


# ---- LoRA ----


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_is_what_peft_makes_of_it(dtype, dropout, tmp_path):
    peft = pytest.importorskip("peft")
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(30, 24, dtype=dtype)
    settings = RandLoraConfig(r=8, target_modules=CHAIN, randlora_dropout=dropout)
    result = estimate(Chain().to(dtype), settings, 30, inputs=x)
    told, dense = result["methods"]["lora"], result["methods"]["dense"]
    more = told["trainable_parameters"] - dense["trainable_parameters"]
    assert abs(more) <= told["trainable_parameters"] / told["rank"] / 2  # no other rank is nearer
    plain = Chain().to(dtype).requires_grad_(False)
    for name in ("q", "k", "v"):
        plain.blocks[0][name].register_forward_hook(lambda layer, args, y: y.requires_grad_())
    with FlopCounterMode(display=False) as frozen:
        y = plain(x).sum()
        frozen_forward = frozen.get_total_flops()
        y.backward()
    model = peft.get_peft_model(
        Chain().to(dtype), peft.LoraConfig(r=told["rank"], target_modules=CHAIN, lora_dropout=dropout)
    )
    assert told["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    with FlopCounterMode(display=False) as flops:
        with SavedBytes(model.parameters()) as saved:
            y = model(x)
        forward = flops.get_total_flops()
        y.sum().backward()
    activations = sum(size for size, t in saved.storages.values() if size > 8)  # scaling factors are no activations
    assert told["saved_bytes"] == activations
    assert told["multiply_adds"] == (flops.get_total_flops() - frozen.get_total_flops()) / 2
    assert told["forward_multiply_adds"] == (forward - frozen_forward) / 2
    model.save_pretrained(tmp_path)
    assert told["file_bytes"] == pytest.approx((tmp_path / "adapter_model.safetensors").stat().st_size, abs=600)
