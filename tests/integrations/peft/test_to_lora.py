"""PEFT's own conversion to LoRA (``convert_to_lora``, ``save_as_lora``): of accelerated models as of PEFT's own."""

import contextlib
import copy

import pytest
import torch
from helpers.common import reference_update

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
conversion = pytest.importorskip("peft.tuners.lora.conversion")  # earlier versions of PEFT have none
from helpers.peft_models import KINDS, adapt, adapted, both, config, conv1d, layers, llama, logits, randomize  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402


def products(state):
    """Layer -> ``B @ A`` in float64: the sign of a singular vector, and so A and B alone, may be either."""
    return {
        name.removesuffix(".lora_A.weight"): state[name.replace("lora_A", "lora_B")].double() @ tensor.double()
        for name, tensor in state.items()
        if name.endswith(".lora_A.weight")
    }


def assert_converts_as(plain, model, rank, **arguments):
    """`model` becomes what PEFT's `plain` becomes: config, names, shapes, dtypes, and numbers but for rounding."""
    (settings, expected), (found, state) = (conversion.convert_to_lora(m, rank, **arguments) for m in (plain, model))
    assert found.to_dict() == settings.to_dict()
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    found = products(state)
    for name, update in products(expected).items():
        assert (found[name] - update).norm() <= 2e-5 * update.norm() and update.norm() > 0, name
    for name in state:
        assert "lora_" in name or torch.equal(state[name], expected[name]), name


def injected(accelerated):
    model = llama()
    with integration.enable() if accelerated else contextlib.nullcontext():
        peft.inject_adapter_in_model(config("q_proj", "down_proj"), model)
    return randomize(model)


TARGETS = config("q_proj", "v_proj", "up_proj", "down_proj")
PAIRS = {
    **{kind: lambda kind=kind: both(llama(), config(*TARGETS.target_modules, **KINDS[kind])) for kind in KINDS},
    "16-bit": lambda: both(llama(torch.bfloat16), TARGETS),
    "Conv1D, wide": lambda: both(conv1d(24, 41), config("layer", fan_in_fan_out=True)),
    "Conv1D, tall": lambda: both(conv1d(41, 24), config("layer", fan_in_fan_out=True)),
    "expression": lambda: both(llama(), peft.RandLoraConfig(r=5, target_modules=r".*1\.self_attn\.(q|v)_proj")),
    "modules to save": lambda: both(llama(), config("q_proj", modules_to_save=["lm_head"])),
    "injected": lambda: (injected(False), injected(True)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_same_as_pefts(pair):
    """Of a rank, and of the rank that a share of the energy needs; of models that are built so, and converted ones."""
    plain, model = PAIRS[pair]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_converts_as(plain, model, 3)
    assert_converts_as(plain, model, 0.9)
    if pair == "dense":
        assert_converts_as(plain, model, 4, compile_kwargs={"backend": "eager"})
    assert_converts_as(copy.deepcopy(plain), integration.accelerate(plain), 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [*KINDS, "hadamard"])
def test_the_saved_folder_is_the_same_model(kind, tmp_path):
    """At full rank nothing is lost; below, as much as the singular values that are left out say."""
    if kind == "hadamard":  # which PEFT cannot name: it loads the file of one
        ours = randlora.RandLoraConfig(r=5, randlora_alpha=7, kind=kind, target_modules=["q_proj", "up_proj"])
        randlora.get_peft_model(llama(), ours).save_pretrained(tmp_path / "ours", for_peft=True)
        with integration.enable():
            model = randomize(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours"))
        assert all(layer.pattern("default") is not None for layer in adapted(model))
    else:
        model = adapt(llama(), config("q_proj", "up_proj", **KINDS[kind]))
    expected = logits(model)
    peft.save_as_lora(tmp_path / "full", model, rank=24)
    peft.save_as_lora(tmp_path / "less", model, rank=3)
    for enabled in (False, True):
        with integration.enable() if enabled else contextlib.nullcontext():
            full = peft.PeftModel.from_pretrained(llama(), tmp_path / "full")
            less = peft.PeftModel.from_pretrained(llama(), tmp_path / "less")
        torch.testing.assert_close(logits(full), expected, rtol=1e-4, atol=1e-4)
        assert (logits(less) - expected).abs().max() > 0.01
    updates = {name: m.get_delta_weight("default").double() for name, m in less.named_modules() if hasattr(m, "lora_A")}
    for name, update in updates.items():
        whole = model.get_submodule(name).get_delta_weight("default").detach().double()
        lost = torch.linalg.svdvals(whole)[3:].norm()
        torch.testing.assert_close((update - whole).norm(), lost, rtol=1e-4, atol=0)


def test_each_of_several_adapters():
    """Each with its own bases, whichever is active, merged or not; one that not all layers have is refused by name."""
    model = adapt(llama(), config("q_proj", "v_proj"))
    others = {"smaller": config("q_proj", "v_proj", r=3), "ternary": config("q_proj", "v_proj", r=4, sparse=True)}
    for i, (name, other) in enumerate(others.items()):
        model.add_adapter(name, copy.deepcopy(other))
        alone = adapt(llama(), other, False, adapter_name=name)
        with torch.no_grad():
            for key, parameter in randomize(alone, 100 * (i + 1)).named_parameters():
                if "randlora_" in key:
                    model.get_parameter(key).copy_(parameter)
        assert_converts_as(alone, model, 3, adapter_name=name)
        model.merge_adapter([name])
        assert_converts_as(alone, model, 3, adapter_name=name)
        model.unmerge_adapter()
    model.add_adapter("elsewhere", config("k_proj"))
    with pytest.raises(ValueError, match="no adapter named 'elsewhere'; it has: default, smaller, ternary"):
        peft.convert_to_lora(model, 3, "elsewhere")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers(bits):
    """PEFT (0.21.2) converts none of bitsandbytes', though the update does not depend on the weight."""
    bnb = pytest.importorskip("bitsandbytes")
    model = layers(wide=(64, 128), tall=(128, 64))
    for name in model.names:
        linear = getattr(model, name)
        size = (linear.in_features, linear.out_features)
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=new)
        setattr(model, name, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(adapt(model, config("wide", "tall"), False), 64)
    model = adapt(model, config("wide", "tall"))
    _, state = peft.convert_to_lora(model, 64)
    for name, product in products(state).items():
        expected = reference_update(model.get_submodule(name))
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
