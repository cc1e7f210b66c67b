"""Files: written accelerated and read by PEFT, written by PEFT and read accelerated, with and without projections."""

import contextlib
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.common import over  # noqa: E402
from helpers.peft_models import KINDS, adapt, bases, both, config, layers, llama, logits, randomize, version  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

TARGETS = "q_proj", "v_proj", "down_proj"


def load(base, folder, accelerated, **arguments):
    with integration.enable() if accelerated else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that the copies per layer are missing
        return peft.PeftModel.from_pretrained(base, folder, **arguments)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("projections", [True, False], ids=["projections", "no_projections"])
@over("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind, dtype, projections, tmp_path):
    """The trained numbers and the bases arrive unchanged, whoever wrote and whoever reads."""
    theirs, ours = both(llama(dtype), config(*TARGETS, save_projection=projections, **KINDS[kind]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    written = weights(tmp_path / "theirs")
    names = [n for n in weights(tmp_path / "ours") if n.endswith(("randlora_A", "randlora_B"))]
    assert names == (["base_model.randlora_A", "base_model.randlora_B"] if projections else [])
    assert sum(n.endswith("randlora_A") for n in written) == 7 * projections, "PEFT: one copy per layer and one more"
    for folder in ("theirs", "ours"):
        for name, tensor in weights(tmp_path / folder).items():
            assert torch.equal(tensor.float(), written[name].float()), name
        for accelerated in (False, True):
            found = load(llama(dtype), tmp_path / folder, accelerated)
            for a, b in zip(bases(found), bases(theirs), strict=True):
                assert torch.equal(a.float(), b)
            assert torch.equal(logits(found), logits(ours if accelerated else theirs))


@pytest.mark.parametrize("arguments", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_ways_to_load(safe, arguments, tmp_path, recwarn):
    theirs, ours = both(llama(), config(*TARGETS))
    for model in (theirs, ours):
        model.save_pretrained(tmp_path, safe_serialization=safe)
        recwarn.clear()
        with integration.enable():
            found = peft.PeftModel.from_pretrained(llama(), tmp_path, **arguments)
        assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
        torch.testing.assert_close(logits(found), logits(theirs))
        trained = [name for name, p in found.named_parameters() if p.requires_grad]
        assert len(trained) == (12 if arguments.get("is_trainable") else 0)


def test_file_in_16_bits(tmp_path):
    """Bases that were drawn in bf16 are written in bf16: half of PEFT's bytes, the same numbers."""
    theirs, ours = both(llama(torch.bfloat16), config(*TARGETS))
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    a, b = (weights(tmp_path / folder)["base_model.randlora_B"] for folder in ("theirs", "ours"))
    assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16) and torch.equal(a, b.float())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu"])
@pytest.mark.parametrize("where", ["model", "layers"])
@over("dtype", (torch.float32, torch.bfloat16))
def test_bases_of_the_file_count(dtype, where, low_cpu_mem_usage, tmp_path):
    """Not those drawn from its seed; from files of models without a tuner too, which have them in the layers only."""
    theirs = adapt(llama(dtype), config(*TARGETS), False)
    for tensor in bases(theirs):
        tensor.copy_(torch.randn_like(tensor))  # no bf16 numbers
    theirs.save_pretrained(tmp_path)
    names = {
        "model": lambda name: name.count(".") == 1 or not name.endswith(("randlora_A", "randlora_B")),
        "layers": lambda name: name.count(".") > 1,
    }
    kept = {name: tensor for name, tensor in weights(tmp_path).items() if names[where](name)}
    assert sum(name.endswith("randlora_A") for name in kept) == {"model": 1, "layers": 6}[where]
    rewrite(tmp_path, kept)
    found = load(llama(dtype), tmp_path, True, low_cpu_mem_usage=low_cpu_mem_usage)
    for a, b in zip(bases(found), bases(theirs), strict=True):
        assert torch.equal(a, b), "in fp32, as it is the only dtype that has them"
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(logits(found), logits(theirs), **tolerance)


def test_bases_that_are_too_large_or_do_not_fit(tmp_path):
    """PEFT gives a second adapter the first's bases, saves them with it, and cannot load that file by itself."""
    model = layers(up=(24, 50), down=(50, 24), small=(24, 10))
    theirs = adapt(model, config("up", "down", "small"), False)
    theirs.add_adapter("second", config("small"))
    randomize(theirs, seed=9).set_adapter("second")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(layers(up=(24, 50), down=(50, 24), small=(24, 10)), tmp_path / "second", False, adapter_name="second")
    found = load(model, tmp_path / "second", True, adapter_name="second")
    x = torch.randn(3, 24)
    torch.testing.assert_close(found.base_model.model.small(x), theirs.base_model.model.small(x))

    tensors = weights(tmp_path / "second")
    tensors["base_model.randlora_A"] = tensors["base_model.randlora_A"][:4].contiguous()
    rewrite(tmp_path / "second", tensors)
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.randlora_A.second.*\[4, 1, 50\]"):
        load(layers(up=(24, 50), down=(50, 24), small=(24, 10)), tmp_path / "second", True, adapter_name="second")


def test_whole_state_dicts():
    """As ``torch.save(model.state_dict())`` has them, strictly, from PEFT's model and from the accelerated one."""
    theirs, ours = both(llama(), config(*TARGETS))
    randomize(theirs, seed=30)
    for tensor in bases(theirs):
        tensor.mul_(1.5)
    result = ours.load_state_dict(theirs.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(logits(ours), logits(theirs))
    fresh = adapt(llama(), config(*TARGETS))
    assert not fresh.load_state_dict(ours.state_dict()).missing_keys
    assert torch.equal(logits(fresh), logits(ours))
    state = ours.state_dict()
    del state["base_model.randlora_B.default"]
    with pytest.raises(RuntimeError, match=r"Missing key.*base_model.randlora_B.default"):
        fresh.load_state_dict(state)
    for a, b in zip(bases(fresh), bases(ours), strict=True):
        assert a is not b and a.data_ptr() != b.data_ptr()


def asked_for_by_transformers():
    from transformers.integrations import peft as theirs

    return tuple(int(part) for part in getattr(theirs, "MIN_PEFT_VERSION", "0.20.0").split(".")[:2])


@pytest.mark.skipif(version < asked_for_by_transformers(), reason="transformers asks for a later PEFT")
def test_models_without_a_tuner(tmp_path):
    """``model.add_adapter`` throws PEFT's tuner away: the first layer saves the bases then.

    In PEFT every layer does, and transformers refuses to save tensors that are shared.
    """

    def built(accelerated):
        model = llama()
        with integration.enable() if accelerated else contextlib.nullcontext():
            model.add_adapter(config(*TARGETS))
        return randomize(model)

    theirs, ours = built(False), built(True)
    for which in ("A", "B"):  # not what the seed gives
        theirs.model.layers[0].self_attn.q_proj.get_submodule(f"randlora_{which}")["default"].mul_(1.25)
    state = peft.get_peft_model_state_dict(theirs)
    assert sum(key.endswith("randlora_A") for key in state) == 6
    peft.set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert sum(key.endswith("randlora_A") for key in peft.get_peft_model_state_dict(ours)) == 1

    with pytest.raises(RuntimeError, match="shared tensors"):
        theirs.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    for accelerated in (False, True):
        found = llama()
        with integration.enable() if accelerated else contextlib.nullcontext():
            found.load_adapter(str(tmp_path))
        torch.testing.assert_close(logits(found), logits(theirs))
    layer = integration.accelerate(theirs).to(torch.float64).model.layers[0].self_attn.q_proj
    assert layer.randlora_A["default"].dtype == torch.float64
    assert theirs.load_state_dict(theirs.state_dict()).missing_keys == []


def test_loaded_twice(tmp_path):
    """Adapters whose bases are equal hold one copy of them, also where it is not what their seed gives."""
    model = adapt(llama(), config(*TARGETS))
    for store in (model.base_model.randlora_A, model.base_model.randlora_B):
        store["default"] = store["default"] * 1.25
    model.save_pretrained(tmp_path)
    expected = logits(model)
    randomize(model, seed=70)
    for name in ("one", "two"):
        model.load_adapter(tmp_path, name)
    for store in (model.base_model.randlora_A, model.base_model.randlora_B):
        assert store["one"] is store["two"] is store["default"]
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(load(llama(), tmp_path, False)), expected)


def test_another_file_in_the_same_parameters(tmp_path):
    """PEFT's own hotswap_adapter knows LoRA alone; what it offers beside that writes in place."""
    other = randomize(adapt(llama(), config(*TARGETS)), 700).eval()
    other.save_pretrained(tmp_path)
    model = adapt(llama(), config(*TARGETS)).eval()
    hotswap = pytest.importorskip("peft.utils.hotswap")
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA.* but RANDLORA"):
        hotswap.hotswap_adapter(model, str(tmp_path), "default", "cpu")
    before = [(id(p), p.data_ptr()) for p in model.parameters()]
    assert not torch.equal(logits(model), logits(other))
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(tmp_path), device="cpu"))
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == before
    assert torch.equal(logits(model), logits(other))
