"""Accelerated models as LoRA: by PEFT's own ``convert_to_lora`` and ``save_as_lora``, and by ``to_lora``."""

import contextlib
import copy

import pytest
import safetensors.torch
import torch
from helpers.common import normal, reference_update

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
conversion = pytest.importorskip("peft.tuners.lora.conversion")  # earlier versions of PEFT have none
from helpers.peft_models import (  # noqa: E402
    KINDS,
    adapt,
    adapted,
    assert_unchanged,
    both,
    config,
    conv1d,
    layers,
    llama,
    logits,
    randomize,
    state,
)

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
    # Versions of PEFT differ in whether no name is None or "".
    assert {k: v or None for k, v in found.to_dict().items()} == {k: v or None for k, v in settings.to_dict().items()}
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


# ---- by randlora.export.to_lora ----

EXPORTED = {
    **{kind: lambda kind=kind: adapt(llama(), config(*TARGETS.target_modules, **KINDS[kind])) for kind in KINDS},
    "16-bit": lambda: adapt(llama(torch.bfloat16), TARGETS),
    "Conv1D": lambda: adapt(conv1d(24, 41), config("layer", fan_in_fan_out=True)),
    "modules to save": lambda: adapt(llama(), config("q_proj", modules_to_save=["lm_head"], task_type="CAUSAL_LM")),
    "injected": lambda: injected(True),
    "accelerated": lambda: integration.accelerate(adapt(llama(), TARGETS, False)),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_to_lora(case, tmp_path):
    """As good as PEFT's conversion, in the same layers and files; the model stays as it was."""
    model = EXPORTED[case]()
    for module in model.modules():  # so that it is seen whether the trained copy is written
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            torch.nn.init.normal_(module.modules_to_save["default"].weight)
    before = state(model)
    exact = randlora.export.to_lora(model, tmp_path / "exact")
    less = randlora.export.to_lora(model, tmp_path / "less", rank=3)
    assert_unchanged(model, before)
    assert exact["exact"] and not less["exact"]
    settings, expected = conversion.convert_to_lora(model, 3)
    found = safetensors.torch.load_file(tmp_path / "less" / "adapter_model.safetensors")
    prefix = "base_model.model." if case == "injected" else ""  # which PEFT's conversion leaves out there
    expected = {prefix + name: tensor for name, tensor in expected.items()}
    assert found.keys() == expected.keys()
    theirs = products(expected)
    for name, product in products(found).items():
        assert (product - theirs[name]).norm() <= 2e-5 * product.norm()
    for name in found:
        assert "lora_" in name or torch.equal(found[name], expected[name])
    ours = peft.LoraConfig.from_pretrained(tmp_path / "less")
    assert (ours.r, ours.lora_alpha, ours.modules_to_save) == (3, 3, settings.modules_to_save)
    assert ours.task_type == getattr(getattr(model, "active_peft_config", None), "task_type", None)
    if case not in ("16-bit", "Conv1D", "injected"):
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "exact")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
        # So does the folder that PEFT saves.
        model.save_pretrained(tmp_path / "saved")
        randlora.export.to_lora(tmp_path / "saved", tmp_path / "again", rank=3, base_model=llama())
        again = safetensors.torch.load_file(tmp_path / "again" / "adapter_model.safetensors")
        for name, product in products(again).items():
            assert (product - theirs[name]).norm() <= 2e-5 * product.norm()


@pytest.mark.parametrize("bias, ours", [("all", "all"), ("randlora_only", "lora_only")])
def test_to_lora_with_trained_biases(bias, ours, tmp_path):
    """Which PEFT's conversion refuses."""
    plain = layers(a=(12, 9), b=(9, 12))
    model = adapt(plain, config("b", bias=bias, r=3))
    with torch.no_grad():
        for i, name in enumerate(("a", "b")):
            if bias == "all" or name == "b":
                base = model.get_submodule(f"base_model.model.{name}")
                getattr(base, "base_layer", base).bias.add_(1 + i)
    randlora.export.to_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert loaded.active_peft_config.bias == ours
    torch.testing.assert_close(loaded(normal(2, 12)), model(normal(2, 12)))
    assert (model(normal(2, 12)) - plain(normal(2, 12))).abs().max() > 0.1


def test_to_lora_of_one_of_several_adapters(tmp_path):
    """Also of one that not all layers have, which PEFT's conversion cannot take, and that is not active."""
    model = adapt(llama(), config("q_proj", "v_proj"))
    model.add_adapter("other", config("k_proj", r=3, sparse=True))
    randomize(model, 7)
    exact = randlora.export.to_lora(model, tmp_path, adapter="other")
    assert [row["name"].rpartition(".")[2] for row in exact["layers"]] == ["k_proj", "k_proj"]
    model.set_adapter("other")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="no adapter named 'another'; it has: default, other"):
        randlora.export.to_lora(model, tmp_path / "new", adapter="another")


def test_offloaded_models(tmp_path):
    """PEFT's own RandLoRA cannot be built or called there."""
    accelerate = pytest.importorskip("accelerate")
    here, away = adapt(llama(), TARGETS), adapt(llama(), TARGETS)
    accelerate.cpu_offload(away, "cpu")
    assert all(parameter.is_meta for parameter in away.parameters())
    assert_converts_as(here, away, 3)
    files = []
    for i, model in enumerate((here, away)):
        randlora.export.to_lora(model, tmp_path / str(i), rank=3)
        files.append((tmp_path / str(i) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_to_lora_of_what_randlora_does_not_compute(tmp_path):
    refused = {
        r"PEFT's own: call randlora\.integrations\.peft\.accelerate\(model\) first": adapt(llama(), TARGETS, False),
        "accelerated RandLoRA layers of PEFT, or the folder.*got LlamaForCausalLM": llama(),
        "got PeftModel": peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])),
    }
    for match, model in refused.items():
        with pytest.raises(TypeError, match=match):
            randlora.export.to_lora(model, tmp_path / "new")
    accelerated = adapt(llama(), TARGETS)
    with pytest.raises(ValueError, match="base_model is for the folder"):
        randlora.export.to_lora(accelerated, tmp_path / "new", base_model=llama())
    with pytest.raises(ValueError, match=r"inputs: .* save the adapter and give its folder"):
        randlora.export.to_lora(accelerated, tmp_path / "new", inputs=torch.zeros(1, 1, dtype=torch.long))
    with torch.no_grad():
        adapted(accelerated)[-1].randlora_gamma["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"randlora_gamma.*NaN"):
        randlora.export.to_lora(accelerated, tmp_path / "new")
    assert not list(tmp_path.iterdir())
