"""RandLoraConfig(target_parameters=...): which parameters it means, and models of experts with adapters on them."""

import copy
import json
import warnings

import pytest
import torch
from helpers.experts_cases import E, families, own, tiny, updates
from helpers.models import IDS, layers_of, randomize, tiny_llama
from safetensors import safe_open
from torch import nn

import randlora
from randlora.layers.joint import Together

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS = {"r": 3, "randlora_alpha": 6, "target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS}


def adapted(family="Mixtral", model=None, **settings):
    model = tiny(family) if model is None else model
    return randomize(randlora.get_peft_model(model, SETTINGS | settings))


def by_hand(plain, model, names=("default",)):
    """`plain` with the updates of these adapters, by the formula."""
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            weight = plain.get_parameter(path if layer.num_experts else f"{path}.weight")
            for name in names:
                if name in layer.randlora_lambda:
                    weight.add_(updates(layer, name) if layer.num_experts else layer.get_delta_weight(name))
    return plain


def close(got, expected):
    # transformers' norms compute in fp32.
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@families
def test_a_model_with_experts_and_linear_layers(family, tmp_path):
    plain = tiny(family)
    model = adapted(family, copy.deepcopy(plain))
    logits = model(IDS).logits
    close(logits, by_hand(plain, model)(IDS).logits)
    assert (logits - plain(IDS).logits).abs().max() > 0.02
    # lambda and gamma of two parts of the experts, and of two linear layers, in each of two blocks
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4 and all("randlora" in name for name in trained)
    at = "model.model.layers.1.mlp.experts.gate_up_proj"
    m = min(plain.model.layers[0].mlp.experts.gate_up_proj.shape[1:])
    assert trained[f"{at}.randlora_lambda.default"] == [E, 3, -(-m // 3)]
    assert trained[f"{at}.randlora_gamma.default"] == [E, -(-m // 3), m]
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    logits.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        close(model(IDS).logits, plain(IDS).logits)

    model.save_pretrained(tmp_path)
    loaded = randlora.RandLoraModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(loaded(IDS).logits, logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert f"base_model.{at}.randlora_lambda" in keys and len(keys) == len(trained)
    given = json.loads((tmp_path / "adapter_config.json").read_text())
    assert given["target_parameters"] == EXPERTS and given["peft_type"] == "RANDLORA_PHILOX"
    with pytest.raises(ValueError, match=r"PEFT's RandLoRA has no target_parameters"):
        model.save_pretrained(tmp_path, for_peft=True)

    before = copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=True)
    close(model(IDS).logits, logits)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = loaded.merge_and_unload()
    close(merged(IDS).logits, logits)
    assert type(merged.model.layers[0].mlp.experts) is type(plain.model.layers[0].mlp.experts)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    back = model.unload()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in back.state_dict().items())


def test_peft_refuses_the_file(tmp_path):
    peft = pytest.importorskip("peft")
    adapted(target_modules=[]).save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError), match="RANDLORA_PHILOX"):
        peft.PeftModel.from_pretrained(tiny("Mixtral"), tmp_path)


@pytest.mark.parametrize("kind", ["hadamard", "very_sparse", "sign"])
def test_bases_of_every_kind_come_back(kind, tmp_path):
    model = adapted("Qwen3Moe", kind=kind, target_modules=None, num_bases=2)
    assert model.peft_config["default"].target_modules == []  # PEFT has no defaults for this architecture
    model.save_pretrained(tmp_path, for_peft=False)
    loaded = randlora.RandLoraModel.from_pretrained(tiny("Qwen3Moe"), tmp_path, is_trainable=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert all(p.requires_grad == ("randlora" in name) for name, p in loaded.named_parameters())


def test_pefts_bases_and_bases_that_are_not_kept(tmp_path):
    model = adapted("GptOss", prng="peft")
    model.save_pretrained(tmp_path)
    loaded = randlora.RandLoraModel.from_pretrained(tiny("GptOss"), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    model = adapted(projection_prng_key=77)
    logits = model(IDS).logits
    randlora.keep_bases(model, False)
    assert torch.equal(model(IDS).logits, logits)
    randlora.keep_bases(model, True)
    with torch.no_grad(), randlora.inference_cache() as scope:
        for _ in range(3):
            close(model(IDS).logits, logits)
        assert scope.nbytes <= 2 * 2 * 16 * 16 * 8  # of linear layers alone


def test_what_is_trained_beside_them(tmp_path):
    model = adapted("GptOss", target_modules=[], bias="all", modules_to_save=["router"])
    trained = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default", "bias", "weight"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)
    model.save_pretrained(tmp_path)
    loaded = randlora.RandLoraModel.from_pretrained(tiny("GptOss"), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_several_adapters_on_different_parts():
    plain = tiny("GptOss")
    model = adapted(model=copy.deepcopy(plain), target_modules=[], target_parameters=["experts.down_proj"])
    model.add_adapter("b", SETTINGS | {"r": 2, "randlora_alpha": 2, "kind": "hadamard"})
    model.add_adapter("c", {"r": 2, "target_modules": ["q_proj"]})
    randomize(randomize(model, "b", seed=2), "c", seed=3)
    close(model(IDS).logits, by_hand(plain, model)(IDS).logits)
    for names in (["b"], ["default", "b", "c"], ["c"], ["default"]):
        model.set_adapter(names)
        close(model(IDS).logits, by_hand(plain, model, names)(IDS).logits)
        assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == set(names)
    model.merge_adapter(["b"])
    close(model(IDS).logits, by_hand(plain, model, ["default", "b"])(IDS).logits)
    with pytest.raises(ValueError, match="merged adapters: call unmerge_adapter"):
        model.add_adapter("d", SETTINGS)
    model.unmerge_adapter()
    model.delete_adapter("b")
    close(model(IDS).logits, by_hand(plain, model, ["default"])(IDS).logits)
    model.add_weighted_adapter(["default"], [0.5], "lower")
    assert model.peft_config["lower"].target_modules == []
    assert model.peft_config["lower"].target_parameters == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    model.add_weighted_adapter(["lower", "default"], [2.0, 0.0], "whole")
    model.set_adapter("whole")
    close(model(IDS).logits, by_hand(plain, model, ["default"])(IDS).logits)
    with pytest.raises(ValueError, match="experts get the tokens that are routed to them"):
        model(IDS, adapter_names=["default"] * len(IDS))


def test_training_goes_on_from_a_file(tmp_path):
    from randlora.checkpoint.restoring import restore

    model = adapted()
    model.save_pretrained(tmp_path)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    randomize(model, seed=7)
    restore(model, tmp_path)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters() if p.requires_grad)
    other = adapted(target_parameters=EXPERTS[:1])
    with pytest.raises(ValueError, match="layers that are not in both"):
        restore(other, tmp_path)
    with pytest.raises(ValueError, match=r"gate_up_proj.randlora_lambda must have shape"):
        randlora.RandLoraModel.from_pretrained(tiny("Mixtral", num_local_experts=4), tmp_path)


def test_generating_and_checkpointing():
    model = adapted("Qwen3Moe")
    words = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    merged = by_hand(tiny("Qwen3Moe"), model).generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(words, merged)
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(IDS).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * one.abs().max().item())


def test_a_model_without_numbers(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    cls, config = type(model.model), model.config
    with torch.device("meta"):
        empty = cls(config).double()
    new = randlora.get_peft_model(copy.deepcopy(empty), SETTINGS).to_empty(device="cpu")
    for layer in layers_of(new).values():
        assert not layer.randlora_lambda["default"].any()
        assert (layer.randlora_gamma["default"] == 1 / max(layer.randlora_gamma["default"].shape[-2:])).all()
    later = randlora.RandLoraModel.from_pretrained(empty, tmp_path)
    assert later(IDS.to("meta")).logits.shape == (*IDS.shape, 19)
    weights = {name: value for name, value in model.state_dict().items() if "randlora" not in name}
    later.load_state_dict(weights, strict=False, assign=True)
    later.model.model.rotary_emb = model.model.model.rotary_emb
    later.model.set_experts_implementation("eager")
    close(later(IDS).logits, model(IDS).logits)


# ---- which parameters are meant ----


class Two(nn.Module):
    """Experts under a name and, once more, under another; and what is no experts module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": own(), "proj": nn.Linear(3, 3)}) for _ in range(3)])
        self.again = self.layers[2]["experts"]
        self.table = nn.Parameter(torch.zeros(2, 3, 4))
        self.other = nn.Module()
        self.other.stack = nn.Parameter(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_parameters": ["down_proj"]}, [0, 1, 2]),
        ({"target_parameters": ["layers.1.experts.down_proj"]}, [1]),
        ({"target_parameters": ["again.down_proj"]}, []),
        ({"target_parameters": ["down_proj"], "layers_to_transform": [0, 2]}, [0, 2]),
        ({"target_parameters": ["down_proj"], "exclude_modules": ["layers.0.experts"]}, [1, 2]),
        ({"target_parameters": ["down_proj"], "exclude_modules": r".*\.[01]\.experts\.down_proj"}, [2]),
        ({"target_parameters": ["down_proj"], "target_modules": "all-linear"}, [0, 1, 2]),
    ],
    ids=str,
)
def test_endings_of_names(settings, expected):
    model = Two()
    if not expected:
        with pytest.raises(ValueError, match="leave out"):
            randlora.get_peft_model(model, {"r": 2} | settings)
        return
    adapted = randlora.get_peft_model(model, {"r": 2} | settings)
    names = [name for name, layer in layers_of(adapted).items() if layer.num_experts]
    assert names == [f"layers.{i}.experts.down_proj" for i in expected]
    linear = [name for name, layer in layers_of(adapted).items() if layer.num_experts is None]
    assert len(linear) == (3 if "target_modules" in settings else 0)
    assert adapted.model.again is adapted.model.layers[2]["experts"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_parameters": ["experts.up_prj"]}, r"'experts.up_prj' matches no .* did you mean 'experts.up_proj'"),
        ({"target_parameters": ["down_proj", "gone"]}, r"'gone' matches no parameter"),
        ({"target_parameters": ["proj.weight"]}, "the weight of a Linear: target_modules adapts it"),
        ({"target_parameters": ["stack"]}, r"'other.stack', a parameter 2x3x4 of a Module, which cannot be adapted"),
        ({"target_parameters": ["table"]}, "'table' is a parameter of the model itself"),
        ({"target_parameters": ["proj.bias"]}, "bias"),
        ({"target_modules": []}, "at least one layer"),
        ({"target_modules": ["experts"]}, "target_parameters adapts its up_proj and down_proj"),
        (
            {"target_modules": ["proj", "down_proj"]},
            r"'down_proj' matches no layer of this model \(its.* target_parameters adapts the weights of its experts: "
            r"experts.up_proj, experts.down_proj\)",
        ),
        ({"target_parameters": ["down_proj"], "modules_to_save": ["experts"]}, "leave out"),
    ],
    ids=str,
)
def test_what_means_nothing_says_so(settings, match):
    model = Two()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises((TypeError, ValueError), match=match):
        randlora.get_peft_model(model, {"r": 2} | settings)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_experts_that_are_modules_are_told_of():
    """transformers 4 has them in Mixtral and Qwen3-MoE."""
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(3, 3)}) for _ in range(2)])})
    with pytest.raises(ValueError, match=r"modules of their own, with linear layers that target_modules adapts: 'w1'"):
        randlora.get_peft_model(model, {"target_parameters": ["experts.gate_up_proj"]})
    with pytest.raises(ValueError, match="no fused experts"):
        randlora.get_peft_model(tiny_llama(), {"target_parameters": ["experts.gate_up_proj"], "target_modules": []})


def test_the_config():
    config = randlora.RandLoraConfig(target_parameters=("a", "b"))
    assert config.target_parameters == ["a", "b"] and config.to_dict()["target_parameters"] == ["a", "b"]
    assert randlora.RandLoraConfig.from_dict(config.to_dict()) == config
    assert randlora.RandLoraConfig(target_parameters=[]).target_parameters is None
    assert "target_parameters" not in randlora.RandLoraConfig().to_dict()
    with pytest.raises(TypeError, match="target_parameters must be a list of names, got 'a'"):
        randlora.RandLoraConfig(target_parameters="a")


def test_a_later_failure_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("Mixtral")
    before, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    join, calls = Together.join, []

    def fail(self, layer):
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError("none left")
        join(self, layer)

    monkeypatch.setattr(Together, "join", fail)
    with pytest.raises(MemoryError):
        randlora.get_peft_model(model, SETTINGS)
    assert [type(m) for m in model.modules()] == types and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_trained_numbers_go_down():
    """Two steps of an optimizer change every expert that has tokens, and the loss goes down."""
    model = randlora.get_peft_model(tiny("Mixtral", torch.float32), SETTINGS | {"kind": "hadamard"}).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = []
        for _ in range(6):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
