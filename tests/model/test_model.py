"""A model with one adapter: its numbers, its parameters, what is left of it after merging, copying, casting."""

import contextlib
import copy
import inspect
import io
import warnings

import pytest
import torch
from helpers.common import HALVES, KINDS, over
from helpers.models import (
    IDS,
    WORDS,
    Net,
    adapt,
    assert_computes,
    merged_by_hand,
    net,
    numbered,
    randomize,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from torch.testing import assert_close

import randlora
from randlora import RandLoraConfig, RandLoraModel, get_peft_model

# ---- numbers ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "up_proj"], ["down_proj"]], ids=str)
def test_forward(kind, target_modules):
    model = adapt(net(), kind=kind, target_modules=target_modules, projection_prng_key=5)
    assert_computes(model, ["default"])
    with torch.no_grad():
        assert_computes(model.eval(), ["default"])


@pytest.mark.parametrize("settings", [{"r": 1}, {"r": 13}, {"r": 40}, {"num_bases": 2}, {"prng": "peft"}], ids=str)
def test_ranks_and_numbers_of_bases(settings):
    assert_computes(adapt(net(), **settings), ["default"])


def test_starts_as_the_base_model():
    model = get_peft_model(net(), RandLoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model(IDS), net()(IDS))
    changed = get_peft_model(net(), RandLoraConfig(r=4, target_modules="all-linear", init_weights=False))
    assert not torch.allclose(changed(IDS), net()(IDS), atol=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "conv1d"])
def test_transformers_models(make):
    plain = make().double()
    model = adapt(make().double(), target_modules="all-linear")
    assert_computes(model, ["default"], plain=plain, call=lambda m: m(IDS).logits)
    before = model(IDS).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    assert_close(merged(IDS).logits, before)


def test_gradients_reach_the_adapters_and_nothing_else():
    model = adapt(net())
    model(IDS).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("randlora_" in name) == p.requires_grad
        assert p.grad is None or p.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def gradients(checkpointing):
        model = adapt(tiny_llama(), r=4).train()
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected, got = gradients(False), gradients(True)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert_close(got[name], gradient)


@pytest.mark.parametrize("old_name", [True, False])
def test_checkpointing_that_was_on_before(old_name):
    base = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable({"use_reentrant": True})
    model = adapt(base).train()
    if not old_name:  # the Trainer calls the new one
        model.activation_checkpointing_enable({"use_reentrant": True})
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_torch_compile():
    model = adapt(net())
    assert_close(torch.compile(model, backend="eager")(IDS), model(IDS))


def test_generate():
    model = adapt(tiny_llama().double(), randlora_alpha=30)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = merged_by_hand(tiny_llama(), model, ["default"])
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        assert torch.equal(model.generate(IDS, **settings, **more), plain.generate(IDS, **settings, **more))
    assert not torch.equal(model.generate(IDS, **settings), tiny_llama().double().generate(IDS, **settings))


# ---- dtypes, copies, state ----


@over("dtype", HALVES)
def test_16_bit_models_train_fp32_parameters(dtype):
    model = adapt(net(dtype), target_modules="all-linear")
    layer = model.model.layers[0].q_proj
    assert layer.randlora_lambda["default"].dtype == layer.randlora_gamma["default"].dtype == torch.float32
    assert model(IDS).dtype == dtype
    plain = net(dtype)
    exact = merged_by_hand(plain, model, ["default"])(IDS)
    rounded = merged_by_hand(plain, model, ["default"]).to(dtype)(IDS)
    assert (model(IDS).double() - exact).norm() <= 2 * (rounded.double() - exact).norm()


def test_to_another_dtype_and_back():
    model = adapt(net())
    model.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_computes(model, ["default"], plain=net(torch.float32), tolerance=2e-5)


def test_meta_model_is_loaded_later():
    trained = adapt(net())
    with torch.device("meta"):
        empty = Net().double()
    model = get_peft_model(empty, trained.peft_config["default"])
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(trained.state_dict())
    assert torch.equal(model(IDS), trained(IDS))


def test_deepcopy_is_independent():
    model = adapt(net())
    before = model(IDS)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and torch.equal(twin(IDS), before)
    assert twin.model.layers[0].q_proj.bases["default"] is model.model.layers[0].q_proj.bases["default"]
    randomize(twin, seed=8)
    twin.delete_adapter("default")
    assert torch.equal(model(IDS), before) and model.active_adapters == ["default"]


def test_special_methods_are_not_the_wrapped_models():
    class Copied(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("the copy of the wrapper was asked of the wrapped model")

    with pytest.raises(AttributeError, match="__deepcopy__"):
        _ = adapt(numbered(Copied().double())).__deepcopy__


def test_torch_save():
    model, file = adapt(net(), kind="very_sparse"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model) and isinstance(loaded, RandLoraModel)
    assert torch.equal(loaded(IDS), model(IDS)) and loaded.peft_config == model.peft_config


def test_state_dict_round_trip():
    model, other = adapt(net()), adapt(net(), seed=2)
    assert not torch.allclose(model(IDS), other(IDS))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS), other(IDS))
    assert not any("randlora_A" in key or "randlora_B" in key for key in model.state_dict())


def test_train_and_eval_reach_everything():
    plain = net().eval()
    model = adapt(plain, randlora_dropout=0.5)
    assert not any(m.training for m in model.model.modules())
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert all(m.training for m in model.modules())
    assert not torch.equal(model(IDS), model(IDS))


# ---- attributes of the wrapped model ----


def test_attributes_are_the_wrapped_models():
    plain = tiny_llama()
    model = adapt(plain)
    assert model.get_base_model() is model.base_model.model is model.model is plain
    assert model.config is plain.config and model.device == plain.device and model.main_input_name == "input_ids"
    assert model.get_input_embeddings() is plain.get_input_embeddings()
    assert model.peft_type == "RANDLORA" and model.active_peft_config is model.peft_config["default"]
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = model.nonesuch


def test_signature_is_the_wrapped_models():
    model = adapt(net())
    assert list(inspect.signature(model.forward).parameters) == ["ids", "scale", "adapter_names"]
    assert type(model).__name__ == "RandLoraModel[Net]" and type(adapt(net())) is type(model)
    assert_close(model(IDS, scale=2.0), 2 * model(IDS))
    question = adapt(tiny_bert("BertForQuestionAnswering"), target_modules=["query"])
    from transformers.utils.generic import can_return_loss, find_labels

    assert find_labels(type(question)) == ["start_positions", "end_positions"]
    assert find_labels(type(adapt(tiny_llama()))) == ["labels"] and not can_return_loss(type(question))


def test_subclasses_of_the_model_class():
    class Own(RandLoraModel):
        def forward(self, *args, **kwargs):
            return -super().forward(*args, **kwargs)

    model = Own(net(), RandLoraConfig(r=4, target_modules=["q_proj"]))
    assert isinstance(model, Own) and torch.equal(model(IDS), -net()(IDS))
    assert isinstance(copy.deepcopy(model), Own)


def test_counting(capsys):
    model = adapt(net(), r=4, target_modules=["q_proj"])
    trained = 2 * (4 * 4 + 4 * 13)  # lambda [r, n] and gamma [n, m] with n = ceil(13 / 4), in two layers
    total = trained + sum(p.numel() for p in net().parameters())
    assert model.get_nb_trainable_parameters() == (trained, total)
    model.print_trainable_parameters()
    text = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    assert capsys.readouterr().out == text


# ---- other programs ----


def test_trainer_losses_are_pefts(tmp_path):
    """Also: the dataset's other columns are dropped, which the Trainer decides by forward's signature."""
    peft, datasets = pytest.importorskip("peft"), pytest.importorskip("datasets")
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(0, WORDS, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "text": ["a"] * 8})
    config = peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["q_proj", "down_proj"])

    def losses(model, **settings):
        arguments = TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=4, max_steps=4, learning_rate=0.05, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=1, **settings,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(model=model, args=arguments, train_dataset=data)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ours = losses(get_peft_model(tiny_llama(), config))
    assert ours == pytest.approx(losses(peft.get_peft_model(tiny_llama(), config)), rel=1e-5)
    assert ours[-1] < ours[0] and len(ours) == 4
    assert ours == pytest.approx(losses(get_peft_model(tiny_llama(), config), gradient_checkpointing=True), rel=1e-5)


def test_what_cannot_be_adapted():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        get_peft_model("model", RandLoraConfig())
    model = adapt(net())
    for adapted in (model, model.model):
        with pytest.raises(ValueError, match="adapted already: add another adapter with add_adapter"):
            get_peft_model(adapted, RandLoraConfig(r=4, target_modules=["q_proj"]))
    assert randlora.get_peft_model is get_peft_model
