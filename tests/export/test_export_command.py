"""``python -m randlora export`` used without the guide: what is left out, mixed up or misplaced."""

import json
import sys

import pytest
import torch
from helpers.models import adapt, tiny_llama

import randlora
from randlora.__main__ import main
from randlora.export import to_lora, to_merged

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter of it, one of the name "policy", and one whose base is gone."""
    here = tmp_path_factory.mktemp("export")
    tiny_llama().save_pretrained(here / "base")
    base = type(tiny_llama()).from_pretrained(here / "base")
    adapt(base, target_modules=["q_proj"], num_bases=2).save_pretrained(here / "adapter")
    base = type(base).from_pretrained(here / "base")
    config = randlora.RandLoraConfig(r=2, target_modules=["q_proj"], num_bases=2)
    randlora.get_peft_model(base, config, adapter_name="policy").save_pretrained(here / "named")
    model = randlora.RandLoraModel.from_pretrained(type(base).from_pretrained(here / "base"), here / "adapter")
    model.peft_config["default"].base_model_name_or_path = str(here / "moved")
    model.save_pretrained(here / "gone")
    return here


@pytest.fixture
def fails(tmp_path, capsys):
    def check(match, *arguments):
        capsys.readouterr()
        assert main(["export", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()

    return check


def test_options_of_the_other_way_are_refused(folder, fails):
    for given in (["--rank", 0], ["--energy", 0.5], ["--per-layer"], ["--inputs", "random"], ["--json"]):
        fails(f"{given[0]} is for --lora", folder / "adapter", "--merged", *given)
    fails("--max-shard-size is for --merged", folder / "adapter", "--lora", "--max-shard-size", "1GB")


@pytest.mark.parametrize("way", ["--lora", "--merged"])
def test_folders_that_hold_no_adapter(way, folder, fails):
    fails("has no adapter 'default'; it has: policy. Name it by adapter", folder / "named", way)
    fails(
        "has no adapter 'other'; it has: policy. Name it by adapter", folder / "named", way, "--adapter-name", "other"
    )
    fails("has no adapter 'other'; it has: default.", folder / "adapter", way, "--adapter-name", "other")
    fails("base holds no adapter, but a whole model", folder / "base", way)
    (folder / "empty").mkdir(exist_ok=True)
    fails("empty holds no adapter", folder / "empty", way)


@pytest.mark.parametrize("way", ["--lora", "--merged"])
def test_a_base_that_is_not_there(way, folder, fails):
    fails("names it as its base: give another by base_model= or --model", folder / "gone", way)


def test_without_tqdm_or_a_terminal_there_is_no_bar(folder, tmp_path, capsys, monkeypatch):
    for i, present in enumerate((True, False)):
        if not present:
            monkeypatch.setitem(sys.modules, "tqdm", None)
            monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        for way in ("--lora", "--merged"):
            output = tmp_path / f"{way}{i}"
            assert main(["export", str(folder / "adapter"), way, "--output", str(output)]) == 0
            out, err = capsys.readouterr()
            assert not err and out.splitlines()[-1].startswith(f"{output} has the ")


def test_inputs_that_a_model_takes(tmp_path, capsys):
    """Random words for what reads and writes; models that take none say so."""
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_ff=10, num_layers=1, num_heads=2, d_kv=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    adapt(model, target_modules=["q", "v"], num_bases=2).save_pretrained(tmp_path / "a")
    arguments = ["--lora", "--rank", "1", "--inputs", "random"]
    assert main(["export", str(tmp_path / "a"), *arguments, "--output", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["logits"]["largest_difference"] > 0

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9, image_size=4, patch_size=2
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    model = transformers.ViTModel.from_pretrained(tmp_path / "vit")
    adapt(model, target_modules="all-linear", num_bases=2).save_pretrained(tmp_path / "c")
    assert main(["export", str(tmp_path / "c"), *arguments, "--output", str(tmp_path / "d")]) == 2
    assert "takes no words" in capsys.readouterr().err
    (tmp_path / "text").write_text("words")
    assert main(["export", str(tmp_path / "c"), *arguments[:-1], str(tmp_path / "text"), "--output", "d"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_python_says_what_to_do(folder, tmp_path):
    model = randlora.RandLoraModel.from_pretrained(tiny_llama(), folder / "adapter").eval()

    def refuses(match, function, *args, error=ValueError, **settings):
        with pytest.raises(error, match=match):
            function(*args, **settings)
        assert not (tmp_path / "out").exists()

    out = tmp_path / "out"
    refuses("inputs: the model cannot be called", to_lora, model, out, rank=1, inputs=torch.tensor([[10**6]]))
    refuses("inputs: the model cannot be called", to_lora, model, out, rank=1, inputs="words")
    refuses("max_shard_size must be", to_merged, model, out, max_shard_size="5")
    refuses("max_shard_size must be", to_merged, model, out, max_shard_size="many GB")
    refuses("adapter_names must be", to_merged, model, out, torch.bfloat16, error=TypeError)
    refuses("base_model must be", to_merged, folder / "adapter", out, base_model=tiny_llama(), error=TypeError)
    for function in (to_lora, to_merged):
        refuses("merge_and_unload", function, model.model, out, error=TypeError)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.zero_()
    assert any("not trained" in note for note in to_lora(model, out, rank=1)["notes"])
