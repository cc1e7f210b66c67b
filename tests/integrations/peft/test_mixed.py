"""Batches of mixed adapters under PEFT: modules to save, heads of every kind, generation, and what is refused."""

import contextlib

import pytest
import torch
from helpers.common import normal
from helpers.models import assert_only_layers_look_like_layers
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from helpers.peft_models import adapt, config, llama, logits, randomize, tokens, version  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

NAMES = ["default", "__base__", "b", "c"]


class Model(nn.Module):
    """A body, and a head that is called with `arguments`."""

    def __init__(self, head, before=lambda x: x, keyword=None, extra=()):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), head
        self.before, self.keyword, self.extra = before, keyword, extra

    def forward(self, x):
        x = self.before(torch.tanh(self.body(x)))
        return self.head(**{self.keyword: x}) if self.keyword else self.head(x, *self.extra)


class Deep(nn.Module):
    """What PEFT's own mixed batches do not take: a head of several layers, one of which may be adapted."""

    def __init__(self):
        super().__init__()
        self.dense, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, scale=1.0):
        return self.out(torch.tanh(self.dense(x))) * scale


def image(x):
    return x.mean(1)[:, :, None, None].expand(-1, -1, 2, 2)


HEADS = {
    "linear": lambda: Model(nn.Linear(6, 3)),
    "pooled": lambda: Model(nn.Linear(6, 3), lambda x: x.mean(1)),
    "flattened": lambda: Model(nn.Linear(6, 3), lambda x: x.flatten(0, 1)),
    "keyword": lambda: Model(nn.Linear(6, 3), keyword="input"),
    "deep": lambda: Model(Deep(), extra=(0.5,)),
    "conv1d": lambda: Model(nn.Conv1d(6, 3, 2), lambda x: x.transpose(1, 2)),
    "conv2d": lambda: Model(nn.Conv2d(6, 3, 1), image),
    "norm": lambda: Model(nn.LayerNorm(6)),
}


def three(model, saved=("default", "b"), targets=("body",), **arguments):
    """Adapters default, b and c; those in `saved` have copies of the head."""

    def settings(name):
        return config(*targets, r=2 + len(name), modules_to_save=["head"] if name in saved else None, **arguments)

    model = adapt(model, settings("default"))
    for name in "bc":
        model.add_adapter(name, settings(name))
    return differ(model)


def differ(model):
    randomize(model)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if ".modules_to_save." in name:
                parameter.copy_(normal(*parameter.shape, seed=i))
    return model.eval()


def alone(model, name, call):
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    active = model.active_adapter
    model.set_adapter(name)
    result = call(model)
    model.set_adapter(active)
    return result


def assert_mixed(model, x, names):
    got = model(x, adapter_names=names)
    rows = len(got) // len(names)
    for i, name in enumerate(names):
        expected = alone(model, name, lambda m, i=i: m(x[i : i + 1]))
        assert_close(got[i * rows : (i + 1) * rows], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [("default", "b"), ("b",), ("c", "default", "b")], ids="-".join)
# Earlier versions of PEFT take no keywords here.
@pytest.mark.parametrize("head", [head for head in HEADS if head != "keyword" or version >= (0, 21)])
def test_every_sample_has_its_own_head(head, saved):
    model, x = three(HEADS[head](), saved), normal(4, 5, 6)
    for active in ("default", "b", "c"):
        model.set_adapter(active)
        assert_mixed(model, x, NAMES)
    assert_mixed(model, x[:1], ["b"])
    assert_mixed(model, x, ["__base__"] * 4)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapted_layer_in_a_head():
    """Which gets a part of the batch."""
    model = three(Model(Deep()), targets=("body", "dense"))
    assert "head.modules_to_save.b.dense.randlora_lambda.c" in "".join(name for name, _ in model.named_parameters())
    for length in (1, 2, 3):
        assert_mixed(model, normal(4, length, 6), NAMES)
        assert_mixed(model, normal(2, length, 6), ["c", "default"])
        assert_mixed(model, normal(4, length, 6), ["b", "b", "c", "b"])


@pytest.mark.skipif(version < (0, 18), reason="PEFT has no set_requires_grad before")
def test_gradients_reach_each_head():
    model, x = three(HEADS["linear"]()).train(), normal(4, 5, 6)
    model.set_requires_grad(["default", "b", "c"], True)
    model(x, adapter_names=["default", "b", "b", "c"]).square().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n.rsplit(".", 2)[1] for n in got if "modules_to_save" in n} == {"default", "b"}
    model.zero_grad()
    for i, name in enumerate(["default", "b", "b", "c"]):
        model.set_adapter(name)
        model(x[i : i + 1]).square().sum().backward()
    for name, gradient in got.items():
        assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def test_sequence_classifier_like_lora():
    """PEFT's LoRA is right; its heads there and ours here choose the same copies."""
    base = transformers.LlamaForSequenceClassification(llama().config)
    base.config.pad_token_id = 0
    found = []
    for kind in (peft.LoraConfig, peft.RandLoraConfig):
        with integration.enable() if kind is peft.RandLoraConfig else contextlib.nullcontext():
            torch.manual_seed(0)
            model = peft.get_peft_model(
                transformers.LlamaForSequenceClassification(base.config),
                kind(target_modules=["q_proj"], r=2, task_type="SEQ_CLS"),
            )
            model.base_model.model.model.load_state_dict(base.model.state_dict(), strict=False)
            model.add_adapter("b", kind(target_modules=["q_proj"], r=2, task_type="SEQ_CLS"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("score.original_module.weight") or "score.modules_to_save" in name:
                    parameter.copy_(normal(*parameter.shape, seed=len(name)))
        # The adapters are new, and change nothing: the heads do.
        found.append(logits(model.eval(), tokens(4), adapter_names=["default", "b", "__base__", "b"]))
        plain = logits(model, tokens(4))
    assert_close(found[1][0], plain[0], rtol=1e-4, atol=1e-4)
    assert all((found[1][i] - plain[i]).abs().max() > 0.1 for i in (1, 2, 3))


def test_embeddings_are_each_adapters_own():
    model = adapt(llama(), config("q_proj", r=3, modules_to_save=["embed_tokens", "lm_head"]))
    model.add_adapter("b", config("v_proj", r=4, modules_to_save=["embed_tokens"]))
    model.add_adapter("c", config("v_proj", r=2))
    differ(model)
    ids = tokens(4)
    got = logits(model, ids, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        assert_close(got[i], alone(model, name, lambda m, i=i: logits(m, ids[i : i + 1]))[0], rtol=1e-4, atol=1e-4)


# ---- as many names as samples ----

REPEATED = {
    "beams": {"num_beams": 3}, "returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampled": {"num_return_sequences": 2, "do_sample": True, "top_k": 1}, "once": {"num_beams": 1},
}  # fmt: skip


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("where", ["arguments", "generation_config", "models"])
@pytest.mark.parametrize("settings", REPEATED.values(), ids=REPEATED)
def test_generate_repeats_names(settings, where, task):
    model = adapt(llama(), config("q_proj", "down_proj", r=3, modules_to_save=["lm_head"], task_type=task))
    model.add_adapter("b", config("v_proj", r=4, modules_to_save=["lm_head"], task_type=task))
    model.add_adapter("c", config("v_proj", r=2, task_type=task))
    differ(model)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **settings}
    if where == "generation_config":
        settings = {"generation_config": transformers.GenerationConfig(**settings)}
    elif where == "models":
        model.generation_config = transformers.GenerationConfig(**settings)
        model.base_model.model.generation_config, settings = model.generation_config, {}
    ids = tokens(4)
    got = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    each = [
        alone(model, name, lambda m, i=i: m.generate(input_ids=ids[i : i + 1], **settings))
        for i, name in enumerate(NAMES)
    ]
    assert torch.equal(got, torch.cat(each))
    with pytest.raises(ValueError, match=r"got 2 names.* for an input of shape \[[0-9]*, 7\]"):
        model.generate(input_ids=ids, adapter_names=["b", "c"], **settings)
    with pytest.raises(ValueError, match="got 2 names"):  # a call repeats nothing, whatever the model's settings
        logits(model, ids, adapter_names=["b", "c"])


@pytest.mark.skipif(
    version < (0, 21)
    and not hasattr(transformers.T5ForConditionalGeneration, "_prepare_encoder_decoder_kwargs_for_generation"),
    reason="earlier versions of PEFT ask for a name that transformers has no more",
)
def test_generate_after_an_encoder():
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4}
    settings = transformers.T5Config(vocab_size=50, decoder_start_token_id=0, pad_token_id=0, **shape)
    torch.manual_seed(0)
    model = adapt(
        transformers.T5ForConditionalGeneration(settings), config("q", "v", "wi", r=3, task_type="SEQ_2_SEQ_LM")
    )
    model.add_adapter("b", config("k", "wo", r=4, task_type="SEQ_2_SEQ_LM"))
    model.add_adapter("c", config("q", r=2, task_type="SEQ_2_SEQ_LM"))
    differ(model)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    ids = tokens(4)
    got = model.generate(input_ids=ids, adapter_names=NAMES, **arguments)
    each = [
        alone(model, name, lambda m, i=i: m.generate(input_ids=ids[i : i + 1], **arguments))
        for i, name in enumerate(NAMES)
    ]
    assert torch.equal(got, torch.cat(each))


class FromMapping(Model):
    def forward(self, batch):
        return super().forward(batch["x"])


class WithArguments(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


def test_inputs_in_a_mapping():
    model = adapt(FromMapping(nn.Linear(6, 3)), config("body", r=2)).eval()
    batch = {"mask": torch.ones(4), "x": normal(4, 5, 6)}
    got = model(batch, adapter_names=["default", "__base__"] * 2)
    assert_close(got[::2], model(batch)[::2])
    with pytest.raises(ValueError, match="got 2 names"):
        model({"x": normal(10, 6)}, adapter_names=["default", "__base__"])  # as many rows as 2 samples of 5 tokens


def test_base_layers_with_arguments_of_their_own():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WithArguments(6, 4)

        def forward(self, x):
            return self.layer(x, 2.0)

    model = adapt(Called(), config("layer", r=2))
    x = normal(3, 5, 6)
    got = model(x, adapter_names=["__base__", "default", "__base__"])
    assert_close(got[1], model(x)[1])
    with model.disable_adapter():
        assert_close(got[::2], model(x)[::2])


# ---- what is refused, and leaves nothing behind ----

ERRORS = {
    "half": (["b", "c"], ValueError, r"one name per sample, got 2 names for an input of shape \[4, 5, 6\]"),
    "one": (["b"], ValueError, "got 1 names"),
    "more": ([*NAMES, *NAMES], ValueError, "got 8 names"),
    "none": ([], ValueError, "an empty list"),
    "unknown": (["b", "c", "d", "d"], ValueError, "got d"),
    "string": ("b", TypeError, "a list of names"),
}


@pytest.mark.parametrize(("names", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_names(names, error, message):
    model, x = three(HEADS["linear"]()), normal(4, 5, 6)
    before = model(x)
    with pytest.raises(error, match=message):
        model(x, adapter_names=names)
    assert torch.equal(model(x), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_merged_and_disabled():
    model, x = three(HEADS["linear"]()), normal(4, 5, 6)
    with model.disable_adapter():
        plain = model(x)
        assert torch.equal(model(x, adapter_names=NAMES), plain)
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="while adapters are merged: call unmerge_adapter"):
        model(x, adapter_names=NAMES)
    model.unmerge_adapter()
    assert_mixed(model, x, NAMES)


class Two(nn.Module):
    def forward(self, x, y=None):
        return (x, x) if y is None else x + y


@pytest.mark.parametrize(("extra", "message"), [((), "tuple"), ((torch.ones(4, 1, 1),), "2 tensors")])
def test_heads_that_cannot_be_taken_apart(extra, message):
    model = three(Model(Two(), extra=extra))
    with pytest.raises(TypeError, match=rf"Two of modules_to_save .* {message}"):
        model(normal(4, 5, 6), adapter_names=NAMES)


@pytest.mark.parametrize("head", ["linear", "deep"])
def test_what_looks_like_a_layer_is_one(head):
    """PEFT's wrappers are no layers, while they take part in a batch as well."""
    model = three(HEADS[head]())
    seen = []

    def look(*_):
        assert_only_layers_look_like_layers(model, but=["merged_adapters"])  # which PEFT's wrappers have
        seen.append([m.get_delta_weight("default") for m in model.modules() if hasattr(m, "randlora_lambda")])

    look()
    model.base_model.model.body.register_forward_hook(look)
    model(normal(4, 5, 6), adapter_names=NAMES)
    assert [len(updates) for updates in seen] == [1, 1]
