"""``model.merged_tensors()`` is the state dict of the merged plain model, and leaves the adapted one as it is."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from helpers.models import (
    IDS,
    SETTINGS,
    adapt,
    add,
    assert_unchanged,
    net,
    numbered,
    randomize,
    snapshot,
    tiny_gpt2,
    tiny_llama,
)
from helpers.partitioned import partitioned
from helpers.quantized_layers import make_base, over_kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.layers import quantized
from randlora.layers.merging import Mergeable
from randlora.model.merged_tensors import parts_of


def merged(model, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties
        return copy.deepcopy(model).merge_and_unload(adapter_names=args[0] if args else None).state_dict()


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name], tensor), name
        assert not got[name].requires_grad


def assert_merges(model, *args):
    before = snapshot(model)
    expected = merged(model, *args)
    assert_same(dict(model.merged_tensors(*args)), expected)
    assert_unchanged(model, before)
    return expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_state_dict_of_the_merged_model(dtype):
    model = adapt(net(dtype), bias="all", modules_to_save=["head"])
    plain = net(dtype).state_dict()
    with torch.no_grad():
        model.model.head.modules_to_save["default"].weight.add_(0.3)
        model.model.layers[0].q_proj.base_layer.bias.add_(0.3)
    found = assert_merges(model)
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    assert {"layers.0.q_proj.weight", "layers.1.up_proj.weight", "head.weight", "layers.0.q_proj.bias"} <= changed


def test_several_adapters_and_what_is_merged_already():
    model = add(adapt(net(torch.bfloat16)), "b", 5, target_modules=["q_proj", "head"])
    assert_merges(model, [])
    assert_merges(model, ["b"])
    one = assert_merges(model)
    model.set_adapter(["default", "b"])
    both = assert_merges(model)
    assert not torch.equal(one["layers.0.q_proj.weight"], both["layers.0.q_proj.weight"])
    model.merge_adapter(["default"])
    assert_merges(model, ["default"])  # nothing is added twice
    assert_merges(model, ["b"])  # what is merged stays
    tensors = model.merged_tensors()
    next(tensors)
    model.merge_adapter()  # another thread's, say: what it has merged is not added once more
    assert_same(dict(list(tensors)), {k: v for k, v in merged(model).items() if k != "embed.weight"})
    with pytest.raises(ValueError, match="no adapter named 'c'"):
        model.merged_tensors(["c"])


def test_what_is_not_changed_is_not_copied_and_what_is_made_is_not_kept(monkeypatch):
    model, made = adapt(net()), []
    make = Mergeable.merged_weight

    def counted(self, *args):
        assert not any(reference() is not None for reference in made)
        result = make(self, *args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Mergeable, "merged_weight", counted)
    held = {p.data_ptr() for p in model.parameters()}
    for name, tensor in model.merged_tensors():
        assert (tensor.data_ptr() in held) == (name.endswith("bias") or name in ("embed.weight", "head.weight"))
        assert sum(reference() is not None for reference in made) == (tensor.data_ptr() not in held)
        del tensor
    assert len(made) == 8


@pytest.mark.parametrize("kind", ["linear", "attention", "quantised"])
def test_nothing_waits_for_the_garbage_collector(kind):
    plain = {
        "linear": net, "attention": lambda: numbered(Attending()),
        "quantised": lambda: nn.ModuleDict({"lin": make_base("cast-e5m2"), "last": nn.LayerNorm(24)}),
    }[kind]()  # fmt: skip
    model = adapt(
        plain, target_modules=["q_proj"] if kind == "linear" else ["lin" if kind == "quantised" else "attention"]
    )
    gc.collect()
    gc.disable()
    try:
        made = [weakref.ref(part) for part in parts_of(model.model, ["default"], dequantize=True).values()]
        list(model.merged_tensors(dequantize=True))
        assert made and all(reference() is None for reference in made)
    finally:
        gc.enable()


def test_nothing_changes_while_it_runs():
    model = adapt(net())
    before, output = snapshot(model), model(IDS)
    seen = []

    def look():
        assert_unchanged(model, before)
        assert torch.equal(model(IDS), output)
        seen.append(not any(layer.merged for layer in model.modules() if isinstance(layer, randlora.Linear)))

    tensors = model.merged_tensors()
    for _ in range(4):
        next(tensors)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError):
        tensors.throw(RuntimeError("in the middle"))
    look()
    assert seen == [True] * 5


@pytest.mark.parametrize("tied", ["adapted", "saved", "both left"])
def test_ties(tied):
    which = {"adapted": {"target_modules": ["q_proj", "lm_head"]}, "saved": {"modules_to_save": ["lm_head"]}}
    model = adapt(tiny_llama(tie_word_embeddings=True), **which.get(tied, {}))
    if tied == "saved":
        with torch.no_grad():
            model.model.lm_head.modules_to_save["default"].weight.add_(1)
    found = assert_merges(model)
    alike = torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert alike == (tied == "both left")
    assert model.model.lm_head.weight is not None and model.config.tie_word_embeddings


def test_transposed_weights():
    assert_merges(adapt(tiny_gpt2(), target_modules=["c_attn", "c_proj"]))


class Attending(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(12, 3, **settings), nn.Linear(12, 12)


@pytest.mark.parametrize("settings", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("target", ["attention", "out_proj"])
def test_attention_of_torch(settings, target):
    model = adapt(numbered(Attending(**settings)), target_modules=[target])
    assert_merges(model)
    model.merge_adapter()
    assert_merges(model)


def test_a_module_in_two_places():
    plain = numbered(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    plain.append(plain[0])
    assert_merges(adapt(plain, target_modules=["0", "2"]))


def test_compiled_models():
    model = adapt(torch.compile(net()))
    assert all(name.startswith("_orig_mod.") for name in assert_merges(model))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_adapters_of_any_model(data):
    """Whatever is adapted, merged and asked for, of layers that may share weights."""
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    plain = net(dtype)
    if data.draw(st.booleans()):
        plain.layers[1].q_proj.weight = plain.layers[0].q_proj.weight
    if data.draw(st.booleans()):
        plain.layers[1].up_proj = plain.layers[0].up_proj
    names, model = ["a", "b", "c"][: data.draw(st.integers(1, 3))], None
    for i, name in enumerate(names):
        config = {
            "r": data.draw(st.integers(1, 5)), "kind": data.draw(st.sampled_from(["dense", "hadamard", "sparse"])),
            "bias": data.draw(st.sampled_from(["none", "all", "randlora_only"])) if i == 0 else "none",
            "modules_to_save": ["head"] if data.draw(st.booleans()) else None,
            "target_modules": data.draw(st.lists(st.sampled_from(SETTINGS["target_modules"]), min_size=1, unique=True)),
        }  # fmt: skip
        model = adapt(plain, name, i, **config) if model is None else add(model, name, i, **config)
    asked = data.draw(st.lists(st.sampled_from(names), unique=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties
        model.merge_adapter(data.draw(st.lists(st.sampled_from(names), unique=True)))
        assert_merges(model, asked)


# ---- experts, and the names of files ----


def experts(cls="Qwen3Moe"):
    from helpers.experts_cases import tiny

    model = tiny(cls)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"r": 3, "target_modules": ["q_proj"], "target_parameters": parameters}
    return randomize(randlora.get_peft_model(model, config))


@pytest.mark.parametrize("cls", ["Qwen3Moe", "GptOss"])
def test_fused_experts_and_their_names_in_files(cls, tmp_path):
    model = experts(cls)
    assert_merges(model)
    safetensors = pytest.importorskip("safetensors.torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
    expected = safetensors.load_file(tmp_path / "model.safetensors")
    got = dict(model.merged_tensors(original_names=True))
    assert_same({name: got[name] for name in sorted(got)}, {name: expected[name] for name in sorted(expected)})
    if cls == "Qwen3Moe":
        assert "model.layers.0.mlp.experts.1.gate_proj.weight" in got


def test_tensors_that_are_one_in_files():
    """A mapping of several of the model's to one in files: they wait for each other."""
    loading = pytest.importorskip("transformers.core_model_loading", reason="transformers 5 has it")
    model = adapt(tiny_llama(num_key_value_heads=4), target_modules=["q_proj", "up_proj"])
    model.model._weight_conversions = [
        loading.WeightConverter(
            source_patterns="self_attn.qkv.weight",
            target_patterns=["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            operations=[loading.Chunk(dim=0)],
        )
    ]
    expected = loading.revert_weight_conversion(model.model, merged(model))
    got = dict(model.merged_tensors(original_names=True))
    assert "model.layers.1.self_attn.qkv.weight" in got
    assert_same({name: got[name] for name in sorted(got)}, {name: expected[name] for name in sorted(expected)})


# ---- kept elsewhere ----


@pytest.mark.parametrize("way", ["cpu", "disk", "map"])
def test_offloaded(way, tmp_path):
    from helpers.offloading import offloaded

    model = adapt(net())
    expected = merged(model)
    offloaded(model, way, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert_same(dict(model.merged_tensors()), expected)
    assert any(p.is_meta for p in model.parameters())


def test_partitioned_by_zero3(monkeypatch):
    model = adapt(net())
    expected = merged(model)
    partitioned(model, monkeypatch)
    assert_same(dict(model.merged_tensors()), expected)
    assert all(p.numel() == 0 for p in model.parameters())


# ---- quantised layers ----


@over_kinds
def test_quantised(kind):
    model = nn.ModuleDict({"a": make_base(kind), "b": make_base(kind, 24, 41, bias=False), "c": nn.LayerNorm(24)})
    weights = {name: quantized.dequantize(model[name]) for name in "ab"}
    bias = getattr(model["a"], "bias", None)
    model = adapt(model, target_modules=["a"])
    with pytest.raises(ValueError, match="dequantize=True"):
        model.merged_tensors()
    layer = model.model["a"]
    update = layer.get_delta_weight("default")
    for dtype, asked in ((torch.float32, True), (torch.bfloat16, torch.bfloat16)):
        got = dict(model.merged_tensors(dequantize=asked))
        assert list(got) == ["a.weight", "a.bias", "b.weight", "c.weight", "c.bias"]
        assert_same(
            {n: got[n] for n in ("a.weight", "b.weight")},
            {"a.weight": (weights["a"] + update).to(dtype), "b.weight": weights["b"].to(dtype)},
        )
        assert torch.equal(got["a.bias"].float(), bias.float()) and got["a.bias"].itemsize > 1
    with pytest.raises(TypeError, match="dequantize"):
        model.merged_tensors(dequantize="yes")
    with pytest.raises(ValueError, match="floating"):
        model.merged_tensors(dequantize=torch.int8)


# ---- refused before the first tensor ----


def test_refused():
    model = adapt(net())
    with torch.no_grad():
        model.model.layers[1].q_proj.randlora_lambda["default"].fill_(float("nan"))
    assert not all(t.isfinite().all() for _, t in model.merged_tensors())
    with pytest.raises(ValueError, match="NaNs detected"):
        list(model.merged_tensors(safe_merge=True))
    nn.utils.parametrizations.weight_norm(model.model.layers[1].q_proj.base_layer)
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj' cannot be merged into.*computed anew"):
        model.merged_tensors()
    model = adapt(net())
    model.model.embed.to("meta")
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        model.merged_tensors()
