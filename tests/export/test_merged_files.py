"""A merged model in files: bit for bit the merged model, one tensor in memory at a time, whole or not there."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from helpers.failing import Failure, calls_of, fail_at
from helpers.models import adapt, add, net, randomize, tiny_bert, tiny_gpt2, tiny_llama

import randlora
from randlora.export import shards, to_lora, to_merged
from randlora.export.base_files import BaseFiles
from randlora.model import ties

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

HEADER = 8


def merged_model(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties
        return copy.deepcopy(model).merge_and_unload()


def assert_same(got, expected):
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name], tensor), name


def assert_loads_as(folder, expected, dtype=None):
    """Plain transformers makes of the folder the very same model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = type(expected).from_pretrained(folder, torch_dtype=dtype or expected.dtype)
    assert_same(loaded.state_dict(), expected.state_dict())
    if loaded.config.model_type == "llama" and loaded.dtype == torch.float32:  # .to() casts buffers, too, for others
        ids = torch.tensor([[1, 5, 2]])
        assert torch.equal(loaded.eval()(ids).logits, expected.eval()(ids).logits)


def saved(plain, folder, **settings):
    """The base's folder, the adapter's, and the adapted model."""
    base, adapter = folder / "base", folder / "adapter"
    plain.save_pretrained(base)
    plain.name_or_path = str(base)
    (base / "tokenizer.json").write_text("of the base")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes")
    (base / "pytorch_model.bin").write_bytes(b"weights")
    settings = {"target_modules": ["q_proj", "down_proj"]} | settings
    model = adapt(plain, **settings)
    for module in model.modules():
        if hasattr(module, "modules_to_save"):
            with torch.no_grad():
                for parameter in module.modules_to_save.parameters():
                    parameter.add_(0.25)
    model.save_pretrained(adapter)
    return base, adapter, model


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("base", "adapter"))


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
    for given in (adapter, model):
        out = tmp_path / type(given).__name__
        to_merged(given, out)
        assert_loads_as(out, expected)
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
    for given in (adapter, model):
        out = tmp_path / type(given).__name__
        to_merged(given, out)
        assert_loads_as(out, expected)
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
    for given in (adapter, model):
        to_merged(given, tmp_path / type(given).__name__)
        assert_loads_as(tmp_path / type(given).__name__, expected)


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
    for given in (adapter, model):
        to_merged(given, tmp_path / type(given).__name__)
        assert_loads_as(tmp_path / type(given).__name__, expected)


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
    for given in (adapter, model):
        out = tmp_path / type(given).__name__
        to_merged(given, out, max_shard_size="20KB")
        assert_loads_as(out, expected)
    assert {
        name
        for path in (tmp_path / type(adapter).__name__).glob("*.safetensors")
        for name in safetensors.load_file(path)
    } == names


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
    for given in (adapter, model):
        out = tmp_path / type(given).__name__
        to_merged(given, out)
        assert_loads_as(out, merged_model(model))
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


# ---- memory ----


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Counted: what is written is freed before the next one is read."""
    _, adapter, _model = saved(tiny_llama(), tmp_path)
    alive, content, get = [], shards._content, BaseFiles.get

    def counted(tensor):
        alive.append(weakref.ref(tensor))
        return content(tensor)

    def read(self, key):
        assert all(reference() is None for reference in alive)
        return get(self, key)

    monkeypatch.setattr(shards, "_content", counted)
    monkeypatch.setattr(BaseFiles, "get", read)
    to_merged(adapter, tmp_path / "out")
    assert len(alive) == len(safetensors.load_file(tmp_path / "out" / "model.safetensors"))


PROCESS = """
import json, os, signal, sys
from transformers import AutoModelForCausalLM
from randlora import RandLoraModel
from randlora.export import shards, to_lora, to_merged

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

def loaded():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
    to_merged(RandLoraModel.from_pretrained(model, sys.argv[2]), sys.argv[4] + "-loaded")

import torch
torch.ones(1024, 1024) @ torch.ones(1024, 1024)  # what libraries allocate once, as for the small model below
to_merged(sys.argv[1], sys.argv[4] + "-small")
print(json.dumps([peak(lambda: to_merged(sys.argv[2], sys.argv[4] + "-large")), peak(loaded)]), flush=True)

content, calls = shards._content, []
def killing(tensor):
    calls.append(None)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return content(tensor)
shards._content = killing
to_merged(sys.argv[1], sys.argv[4], max_shard_size=9000)
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """One process, as starting one takes seconds: it measures what writing takes, and is killed while it writes."""
    folder = tmp_path_factory.mktemp("process")
    _, small, model = saved(tiny_llama(), folder / "small", r=2)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 1000}
    base, large, _ = saved(tiny_llama(**sizes), folder / "large", r=8, num_bases=4)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, *map(str, (small, large, base, folder / "out"))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return folder, small, model, result


def test_memory_is_that_of_a_weight(process):
    """A model of 60 MB in one file, of weights of 2 MB; how few they are at a time is counted above."""
    folder, _, _, result = process
    if "clear_refs" in result.stderr:
        pytest.skip("this system does not let a process reset its high-water mark")
    streamed, loaded = json.loads(result.stdout)
    size = (folder / "out-large" / "model.safetensors").stat().st_size
    assert size > 55e6 and loaded > 0.8 * size
    assert streamed < 0.45 * size, f"{streamed:,d} of {size:,d} bytes"


# ---- interrupted ----


class Interrupted(BaseException):
    pass


def no_space():
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [Interrupted, no_space, Failure])
def test_what_raises_leaves_nothing(error, tmp_path, monkeypatch):
    """`error` makes a new one each time: one that pytest keeps would keep all that its traceback refers to."""
    expected = type(error())
    _, adapter, model = saved(tiny_llama(), tmp_path)
    content, get = shards._content, BaseFiles.get
    for at in (0, 3, 20):
        calls = []

        def failing(*args, original=content, at=at, calls=calls):
            calls.append(None)
            if len(calls) > at:
                raise error()
            return original(*args)

        for owner, name, original in ((shards, "_content", content), (BaseFiles, "get", get)):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda *args, o=original, f=failing: f(*args, original=o))
                with pytest.raises(expected):
                    to_merged(adapter, tmp_path / "deep" / "out", max_shard_size=9000)
            calls.clear()
            assert left(tmp_path) == []
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(error()))
        with pytest.raises(expected):
            to_merged(model, tmp_path / "out")
    assert left(tmp_path) == ["out"] and left(tmp_path / "out") == []
    to_merged(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("of", ["folder", "model"])
def test_a_call_that_fails_leaves_all_or_nothing(of, tmp_path):
    """At calls all over the work, whatever is done in them."""
    _, adapter, model = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    given, out = adapter if of == "folder" else model, tmp_path / "out"

    def write():
        try:
            to_merged(given, out)
        except ValueError as error:  # what libraries raise is told as such
            raise Failure(str(error)) if "has failed" in str(error) else error from error

    calls = calls_of(write)
    complete = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    shutil.rmtree(out)
    for k in [int(calls * share) for share in (0.1, 0.5, 0.8, 0.9, 0.95)] + [calls - i for i in range(1, 160, 12)]:
        if fail_at(k, write) is not None and not out.exists():
            assert left(tmp_path) == [], k
        else:
            assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == complete
            assert left(tmp_path) == ["out"], k
            shutil.rmtree(out)


def test_a_process_that_is_killed_leaves_what_is_marked_as_incomplete(process):
    folder, adapter, model, result = process
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (folder / "out").exists()
    (name,) = [path.name for path in folder.iterdir() if path.name.startswith("out.")]
    assert name.startswith("out.incomplete-") and not (folder / name / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(folder / name)
    to_merged(adapter, folder / "out")
    assert_loads_as(folder / "out", merged_model(model))


# ---- refused before anything is written ----


def test_links_and_sizes(tmp_path):
    """An output that links to another folder, there or not; and sizes of files as they are written."""
    _, adapter, _ = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    (tmp_path / "there").mkdir()
    for i, (name, size, more) in enumerate(
        [("there", 20000, True), ("new", " 20 kb", True), ("other", "1.5GB", False)]
    ):
        link = tmp_path / f"link{i}"
        link.symlink_to(tmp_path / name)
        to_merged(adapter, link, max_shard_size=size)
        assert link.is_symlink() and (tmp_path / name / "config.json").is_file()
        assert (tmp_path / name / shards.INDEX).is_file() == more
        assert more or (tmp_path / name / "model.safetensors").is_file()
    assert left(tmp_path) == ["link0", "link1", "link2", "new", "other", "there"]


def test_refused(tmp_path, monkeypatch):
    base, adapter, model = saved(tiny_llama(), tmp_path)
    out = tmp_path / "out"

    def refuses(match, *args, error=ValueError, **settings):
        before = left(tmp_path)
        with pytest.raises(error, match=match):
            to_merged(*(args or (adapter, out)), **settings)
        assert left(tmp_path) == before

    refuses("holds 'config.json' already", adapter, base)
    refuses("is a file", adapter, base / "config.json")
    for dtype in (torch.int8, torch.float8_e4m3fn, "float16"):
        refuses("dtype must be one of", dtype=dtype)
    refuses("has no adapter 'c'", adapter, out, "c")
    refuses("at least one", adapter, out, [])
    refuses("has its own", model, out, base_model=base)
    refuses("must be a randlora.RandLoraModel or the folder", 3, out, error=TypeError)
    for size in (0, -1, "0KB", "-5GB", "5", "many", "", 1.5, None, True):
        refuses("max_shard_size must be", max_shard_size=size)
    refuses("no config", adapter, out, base_model=adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    refuses("make room", error=OSError)
    monkeypatch.undo()
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(out))  # pathlib asks it since 3.12
    monkeypatch.setattr(type(out), "is_mount", lambda path: path == out)
    refuses("is where a disk is mounted")
    monkeypatch.undo()
    monkeypatch.chdir(out)
    refuses("is the current folder", adapter, ".")
    monkeypatch.undo()
    out.rmdir()
    with torch.no_grad():
        broken = copy.deepcopy(model)
        next(iter(broken.model.model.layers[0].mlp.down_proj.randlora_lambda.values())).fill_(1e30)
        next(iter(broken.model.model.layers[0].mlp.down_proj.randlora_gamma.values())).fill_(1e30)
    refuses("NaN", broken, out)
    large = randomize(copy.deepcopy(model))
    with torch.no_grad():
        for layer in large.model.model.layers:
            layer.mlp.down_proj.randlora_lambda["default"].mul_(1e7)
    large.save_pretrained(tmp_path / "large")
    refuses("down_proj.weight is not finite", tmp_path / "large", out, dtype=torch.float16)
    for path in ("norm", "layers.0.mlp.down_proj.base_layer"):  # of a tensor that is copied, and of one that is merged
        large = copy.deepcopy(model)
        with torch.no_grad():
            large.model.model.get_submodule(path).weight[:1].fill_(1e5)
        refuses("too large for torch.float16", large, out, dtype=torch.float16)
    large.model.generation_config.temperature = 0.5  # which says that it does not sample
    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", None)
        refuses("GenerationConfig is invalid", large, out)
    files = safetensors.load_file(base / "model.safetensors")
    safetensors.save_file(files | {"beside": torch.tensor([1e5])}, base / "model.safetensors", {"format": "pt"})
    refuses("beside has numbers that are too large", dtype=torch.float16)
    safetensors.save_file(files, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refuses("quantised weights")
    for text, match in (("{", "config.json cannot be read"), ("[]", "config.json holds no JSON object, but a list")):
        (base / "config.json").write_text(text)
        refuses(match)
    (base / "config.json").write_text(json.dumps(config))
    for text, match in (
        ("{", "index.json cannot be read"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight"),
    ):
        (base / shards.INDEX).write_text(text)
        refuses(match)
    (base / shards.INDEX).unlink()
    state = safetensors.load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    safetensors.save_file({k: t for k, t in state.items() if k != name}, base / "model.safetensors", {"format": "pt"})
    refuses(f"has no {name}")
    coarse = {k: t.to(torch.float8_e4m3fn) if k == name else t for k, t in state.items()}
    safetensors.save_file(coarse, base / "model.safetensors", {"format": "pt"})
    refuses(f"{name} is of torch.float8_e4m3fn")
    os.remove(base / "model.safetensors")
    refuses("has no model.safetensors, but pytorch_model.bin")


def test_the_command(tmp_path, capsys):
    from randlora.__main__ import main

    _, adapter, model = saved(tiny_llama(), tmp_path)
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--merged", "--output", str(out), "--dtype", "bfloat16"]) == 0
    assert str(out) in capsys.readouterr().out
    assert_loads_as(out, merged_model(model).bfloat16())
    assert main(["export", str(adapter), "--merged", "--output", str(out)]) == 2
    assert "already" in capsys.readouterr().err
