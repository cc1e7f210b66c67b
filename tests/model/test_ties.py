"""Merged models whose tied weights were trained apart: what they compute, and what is left of it after a reload."""

import copy
import warnings

import pytest
import torch
from helpers.common import normal
from helpers.failing import fail_at
from helpers.models import IDS, WORDS, assert_unchanged, snapshot, tiny_bert, tiny_gpt2, tiny_llama

import randlora

transformers = pytest.importorskip("transformers")


def seeded(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


def tiny_t5(cls="T5", **changes):
    settings = {"d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": 2, "vocab_size": WORDS}
    settings |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **changes}
    config = getattr(transformers, f"{cls}Config")(**settings)
    return seeded(getattr(transformers, f"{cls}ForConditionalGeneration"), config)


def tiny_bart():
    config = transformers.BartConfig(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=WORDS, max_position_embeddings=32, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return seeded(transformers.BartForConditionalGeneration, config)


# name -> (model, its layers, its output head, its embeddings)
MODELS = {
    "llama": (lambda: tiny_llama(tie_word_embeddings=True), "q_proj", "lm_head", "model.embed_tokens"),
    "gpt2": (tiny_gpt2, "c_attn", "lm_head", "transformer.wte"),
    "bert": (
        lambda: tiny_bert("BertForMaskedLM"), "query", "cls.predictions.decoder", "bert.embeddings.word_embeddings"
    ),
    "t5": (tiny_t5, "q", "lm_head", "shared"),
    "mt5": (lambda: tiny_t5("MT5"), "q", "lm_head", "shared"),
    "t5_untied_scale": (lambda: tiny_t5(tie_word_embeddings=False), "q", "lm_head", "shared"),
    # Its forward reads config.tie_word_embeddings.
    "switch": (
        lambda: tiny_t5("SwitchTransformers", num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
        "q", "lm_head", "shared",
    ),
    "bart": (tiny_bart, "q_proj", "lm_head", "model.shared"),
}  # fmt: skip
MODES = {
    "head trained": lambda layer, head, embeddings: {"modules_to_save": [head]},
    "embeddings trained": lambda layer, head, embeddings: {"modules_to_save": [embeddings]},
    "both trained": lambda layer, head, embeddings: {"modules_to_save": [embeddings, head]},
    "head adapted": lambda layer, head, embeddings: {"target_modules": [layer, head]},
    "neither": lambda layer, head, embeddings: {},
}


def call(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def adapted(name, mode, change=lambda model: model):
    make, *places = MODELS[name]
    settings = {"r": 4, "randlora_alpha": 3, "target_modules": [places[0]]} | MODES[mode](*places)
    model = randlora.get_peft_model(change(make()), settings).eval()
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * normal(*parameter.shape, seed=i))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_again(name, mode, tmp_path):
    """In memory nothing is tied anew; a file says that nothing is, or holds all, which transformers 5 compares."""
    model = adapted(name, mode)
    base = {key: value.clone() for key, value in MODELS[name][0]().state_dict().items()}
    expected = call(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(call(merged), expected, rtol=1e-4, atol=1e-5)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if mode == "neither":
        assert head.weight is embeddings.weight
    else:
        assert head.weight is not embeddings.weight
        assert merged.config.tie_word_embeddings == (name == "switch")
        owners = [id(p) for _, p in merged.named_parameters(remove_duplicate=False)]
        assert len(owners) == len(set(owners))
    if mode == "head adapted":
        assert torch.equal(embeddings.weight, base[f"{MODELS[name][3]}.weight"])
    merged.save_pretrained(tmp_path)
    loaded, report = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(call(loaded.eval()), expected, rtol=1e-4, atol=1e-5)
    if name != "switch":  # whose forward depends on the setting, so that it must stay
        merged.tie_weights()
        torch.testing.assert_close(call(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["cpu", "disk"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_tied_and_offloaded(name, mode, way, tmp_path):
    """accelerate gives tied weights parameters of their own on meta: that they were one shows in their numbers."""
    accelerate = pytest.importorskip("accelerate")
    offload = {"cpu": accelerate.cpu_offload, "disk": lambda m, d: accelerate.disk_offload(m, str(tmp_path), d)}[way]
    model = adapted(name, mode, lambda m: offload(m, torch.device("cpu")))
    expected = call(model)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings == (mode == "neither")
    torch.testing.assert_close(call(merged), expected, rtol=1e-4, atol=1e-5)
    accelerate.hooks.remove_hook_from_submodules(merged)
    merged.tie_weights()
    torch.testing.assert_close(call(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["head trained", "embeddings trained", "head adapted"])
def test_who_is_parted_is_said(mode):
    with pytest.warns(UserWarning, match=r"share[sd] its weight with .*no longer tied"):
        adapted("llama", mode).merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted("llama", "neither").merge_and_unload()
        adapted("llama", mode).unload()  # without the adapter they are as they were


def test_unloading_leaves_ties_alone():
    for mode in MODES:
        plain = adapted("bart", mode).unload()
        assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.shared.weight
        assert torch.equal(call(plain), call(tiny_bart()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["head trained", "head adapted"])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_failing_leaves_ties_alone(mode, method):
    model = adapted("bart", mode)
    before, expected = snapshot(model), call(model)
    ties, config = copy.deepcopy(model.model.all_tied_weights_keys), model.config.to_dict()
    for k in range(1, 30_000, 1499):
        if fail_at(k, getattr(model, method)) is None:
            break
        assert_unchanged(model, before)
        assert model.model.all_tied_weights_keys == ties and model.config.to_dict() == config
        assert torch.equal(call(model), expected)
    assert k > 5000


def test_weights_parted_in_inference_mode_can_be_trained():
    model = randlora.get_peft_model(tiny_llama(tie_word_embeddings=True), {"r": 2, "target_modules": ["lm_head"]})
    with torch.no_grad():
        model.model.lm_head.randlora_lambda["default"].fill_(0.1)
    with torch.inference_mode(), pytest.warns(UserWarning, match="no longer tied"):
        plain = model.merge_and_unload()
    plain.requires_grad_(True)
    plain(IDS).logits.sum().backward()
