"""Merged models in files: what is written, compared with ``merge_and_unload``."""

import copy
import json
import shutil

import pytest
import torch
from helpers.merged_folders import HEADER, assert_loads_as, assert_same, left, merged_model, saved, written_and_loaded
from helpers.models import adapt, add, net, tiny_bert, tiny_gpt2, tiny_llama

import randlora
from randlora.export import shards, to_lora, to_merged
from randlora.model import ties

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_folder_and_a_model(dtype, tmp_path):
    base, adapter, model = saved(tiny_llama().to(dtype), tmp_path)
    expected = merged_model(model)
    for name, given in (("of folder", adapter), ("of model", model)):
        for size, number in (("5GB", 1), (9000, 4)):
            out = tmp_path / f"{name} {size}"
            assert to_merged(given, out, max_shard_size=size) is None
            assert_loads_as(out, expected)
            files = sorted(out.glob("*.safetensors"))
            assert len(files) >= number and (out / shards.INDEX).exists() == (number > 1)
            if number > 1:
                assert all(path.stat().st_size < 9000 + 2000 for path in files)
                index = json.loads((out / shards.INDEX).read_text())
                there = {key: path.name for path in files for key in safetensors.load_file(path)}
                assert index["weight_map"] == there
                assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.state_dict().values())
            config = json.loads((out / "config.json").read_text())
            assert config["architectures"] == ["LlamaForCausalLM"]
            if given is adapter:
                assert config == json.loads((base / "config.json").read_text())
                assert (out / "tokenizer.json").read_text() == "of the base"
                assert (out / "sub" / "notes.txt").exists() and not (out / "pytorch_model.bin").exists()
            assert (out / "generation_config.json").exists()
    assert left(tmp_path) == ["of folder 5GB", "of folder 9000", "of model 5GB", "of model 9000"]
    assert (tmp_path / "of folder 5GB").stat().st_mode == base.stat().st_mode
    (adapter / "tokenizer.json").write_text("of the adapter")
    to_merged(str(adapter), tmp_path / "again", base_model=str(base))
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "of the adapter"


def test_the_format_is_that_of_safetensors(tmp_path):
    tensors = {
        "a": torch.arange(5, dtype=torch.int8), "b": torch.randn(3, 2).T, "c": torch.tensor(True),
        "d": torch.randn(2, 3, dtype=torch.float64), "e": torch.empty(0, 4), "f": torch.randn(7).bfloat16(),
        "g": torch.randn(3).to(torch.float8_e4m3fn), "h": torch.tensor(3), "i": torch.randn(2, dtype=torch.complex64),
        "é\n": torch.zeros(1),
    }  # fmt: skip
    written = []
    out = shards.Shards(tensors, "1GB")
    out.write(tmp_path, reversed(list(tensors.items())), written.append)
    (path,) = tmp_path.iterdir()
    found = safetensors.load_file(path)
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].float().equal(tensor.float()) if tensor.itemsize < 8 else found[name].equal(tensor)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    length = int.from_bytes(path.read_bytes()[:HEADER], "little")
    header = json.loads(path.read_bytes()[HEADER : HEADER + length])
    assert length % 8 == 0 and sum(written) == out.bytes == path.stat().st_size - HEADER - length
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
    with pytest.raises(ValueError, match="has changed meanwhile"):
        shards.Shards({"a": torch.zeros(2)}, 100).write(tmp_path / "..", [("a", torch.zeros(3))], print)
    with pytest.raises(ValueError, match="max_shard_size"):
        shards.Shards(tensors, True)


# ---- what is written ----


def test_dtype_is_chosen(tmp_path):
    base, adapter, model = saved(tiny_llama(), tmp_path)
    expected = merged_model(model)
    for given in (adapter, model):
        out = tmp_path / type(given).__name__
        to_merged(given, out, dtype=torch.bfloat16)
        assert_loads_as(out, copy.deepcopy(expected).bfloat16(), "auto")
        assert json.loads((out / "config.json").read_text()).get("dtype") == "bfloat16"
    # A wider one: rounded once.
    base, adapter, model = saved(tiny_llama().bfloat16(), tmp_path / "narrow")
    to_merged(adapter, tmp_path / "wide", dtype=torch.float32)
    wide = type(expected).from_pretrained(base, torch_dtype=torch.float32)
    wide = randlora.RandLoraModel.from_pretrained(wide, adapter).merge_and_unload()
    assert_loads_as(tmp_path / "wide", wide)


@pytest.mark.parametrize("tied", ["head", "copy of head", "copy of words", "left"])
def test_tied_weights(tied, tmp_path):
    settings = {
        "head": {"target_modules": ["q_proj", "lm_head"]}, "copy of head": {"modules_to_save": ["lm_head"]},
        "copy of words": {"modules_to_save": ["embed_tokens"]}, "left": {},
    }[tied]  # fmt: skip
    base, adapter, model = saved(tiny_llama(tie_word_embeddings=True), tmp_path, **settings)
    assert "lm_head.weight" not in safetensors.load_file(base / "model.safetensors")
    expected = merged_model(model)
    for out in written_and_loaded(adapter, model, tmp_path, expected):
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (tied == "left")
        assert ("lm_head.weight" in safetensors.load_file(out / "model.safetensors")) == (tied != "left")
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("cls", ["T5", "SwitchTransformers"])
def test_ties_of_models_that_compute_with_the_flag(cls, tmp_path):
    """T5's config takes another setting from it, and the other one's forward reads it."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 19}
    more = {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0} if cls == "SwitchTransformers" else {}
    config = getattr(transformers, f"{cls}Config")(**sizes, **more, decoder_start_token_id=0, pad_token_id=0)
    plain = getattr(transformers, f"{cls}ForConditionalGeneration")(config)
    base, adapter, model = saved(plain, tmp_path, target_modules=["lm_head"])
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "scale_decoder_outputs"}))
    expected = merged_model(model).eval()
    if not hasattr(plain, "all_tied_weights_keys") and ties.computes_with_flag(plain):
        for given in (adapter, model):
            with pytest.raises(ValueError, match="leave that layer out"):
                to_merged(given, tmp_path / "out")
        return
    ids = torch.tensor([[1, 5, 2]])
    for out in written_and_loaded(adapter, model, tmp_path, expected):
        loaded = type(expected).from_pretrained(out).eval()
        results = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (loaded, expected)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["attention"], ["out_proj", "fc1"]], ids=str)
def test_attention_of_torch(targets, tmp_path):
    """SigLIP has one, in whose files q, k and v are one weight."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=16))
    _, adapter, model = saved(plain, tmp_path, target_modules=targets, bias="randlora_only")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(adapter)
    expected = merged_model(model)
    assert len(list(written_and_loaded(adapter, model, tmp_path, expected))) == 2


def test_biases_and_modules_to_save(tmp_path):
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    _, adapter, model = saved(model, tmp_path, bias="randlora_only", modules_to_save=["norm", "lm_head"])
    with torch.no_grad():
        model.model.model.layers[1].self_attn.q_proj.base_layer.bias.add_(0.5)
    model.save_pretrained(adapter)
    expected = merged_model(model)
    assert len(list(written_and_loaded(adapter, model, tmp_path, expected))) == 2


def test_what_is_trained_beside_is_rounded_once(tmp_path):
    """An adapter trained in fp32 on files in bf16: a copy of the head, and biases."""
    tiny_llama(attention_bias=True).bfloat16().save_pretrained(tmp_path / "base")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    model = adapt(plain, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="randlora_only")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(0.1, 0.2, parameter.numel()).view_as(parameter))
    model.save_pretrained(tmp_path / "adapter")
    expected = merged_model(model).state_dict()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, None):
        out = tmp_path / str(dtype)
        to_merged(tmp_path / "adapter", out, base_model=tmp_path / "base", dtype=dtype)
        got = safetensors.load_file(out / "model.safetensors")
        assert_same(got, {name: tensor.to(dtype or torch.bfloat16) for name, tensor in expected.items()})


@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_a_bias_in_two_places(bias, tmp_path):
    """A head's bias that two modules share is one in the adapter's file, and in those of the base."""
    base = tmp_path / "base"
    tiny_bert("BertForMaskedLM").save_pretrained(base)
    model = adapt(transformers.BertForMaskedLM.from_pretrained(base), target_modules=["query"], bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25)
    model.save_pretrained(tmp_path / "adapter")
    to_merged(tmp_path / "adapter", tmp_path / "out", base_model=base)
    assert_loads_as(tmp_path / "out", merged_model(model))
    assert safetensors.load_file(tmp_path / "out" / "model.safetensors").keys() == (
        safetensors.load_file(base / "model.safetensors").keys()
    )
    for source, folder in ((model, "a"), (tmp_path / "adapter", "b")):
        to_lora(source, tmp_path / folder, base_model=None if source is model else base)
    first, second = (safetensors.load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ab")
    assert_same(first, second)


def test_several_adapters(tmp_path):
    _, adapter, model = saved(tiny_llama(), tmp_path)
    add(model, "b", 7, target_modules=["q_proj", "up_proj"])
    model.save_pretrained(adapter)
    model.set_adapter(["default", "b"])
    expected = merged_model(model)
    to_merged(adapter, tmp_path / "both", ["default", "b"])
    assert_loads_as(tmp_path / "both", expected)
    to_merged(model, tmp_path / "active")
    assert_loads_as(tmp_path / "active", expected)
    model.set_adapter("b")
    to_merged(adapter, tmp_path / "one", "b")
    assert_loads_as(tmp_path / "one", merged_model(model))


def test_transposed_weights_and_files_without_the_prefix(tmp_path):
    """GPT-2's own files are of the model without its head; some have masks that no model has any more."""
    base, adapter, model = saved(tiny_gpt2(), tmp_path, target_modules=["c_attn", "c_proj"])
    state = safetensors.load_file(base / "model.safetensors")
    state = {name.removeprefix("transformer."): t for name, t in state.items()} | {"h.0.attn.bias": torch.ones(1, 4)}
    safetensors.save_file(state, base / "model.safetensors", {"format": "pt"})
    to_merged(adapter, tmp_path / "out")
    assert sorted(safetensors.load_file(tmp_path / "out" / "model.safetensors")) == sorted(state)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_same(loaded.state_dict(), merged_model(model).state_dict())


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "fused"])
def test_fused_experts(family, tmp_path):
    from helpers.experts_cases import tiny

    plain = tiny("Qwen3Moe" if family == "fused" else family, torch.float32)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    base, adapter, model = saved(plain, tmp_path, target_modules=["q_proj"], target_parameters=parameters)
    if family == "fused":
        shutil.rmtree(base)
        copy.deepcopy(model).unload().save_pretrained(base, save_original_format=False)
    names = set(safetensors.load_file(base / "model.safetensors"))
    assert ("model.layers.0.mlp.experts.1.gate_proj.weight" in names) == (family == "Qwen3Moe")
    expected = merged_model(model)
    of_folder, _ = written_and_loaded(adapter, model, tmp_path, expected, max_shard_size="20KB")
    assert {name for path in of_folder.glob("*.safetensors") for name in safetensors.load_file(path)} == names


def test_names_that_differ_in_files(tmp_path):
    """LLaVA's language model has another name in its files than among its modules."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**sizes, vocab_size=19, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    base, adapter, model = saved(
        transformers.LlavaForConditionalGeneration(config), tmp_path, target_modules="all-linear",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    names = sorted(safetensors.load_file(base / "model.safetensors"))
    assert set(names) != set(merged_model(model).state_dict())
    for out in written_and_loaded(adapter, model, tmp_path, merged_model(model)):
        assert sorted(safetensors.load_file(out / "model.safetensors")) == names


def test_a_model_that_is_not_of_transformers(tmp_path):
    model = adapt(net(torch.bfloat16))
    to_merged(model, tmp_path / "out")
    assert_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), merged_model(model).state_dict())
    assert left(tmp_path / "out") == ["model.safetensors"]


def test_compiled_models(tmp_path):
    model = tiny_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    whole = adapt(torch.compile(model))
    expected = safetensors.load_file
    to_merged(whole, tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    found = merged_model(whole).state_dict()
    assert_same(loaded.state_dict(), {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()})
    assert_same(dict(whole.merged_tensors(original_names=True)), expected(tmp_path / "out" / "model.safetensors"))
