"""Layers whose weights a model reads without calling them: it is said, and merging does not change what they do."""

import contextlib
import warnings

import pytest
import torch
from helpers.common import normal
from helpers.models import WORDS, assert_unchanged, randomize, snapshot, tiny_llama
from torch import nn
from torch.nn import functional as F

import randlora


class Reads(nn.Module):
    """Calls `called` and reads the weight of `read`; in training, or in eval mode, or in both."""

    def __init__(self, when=(True, False)):
        super().__init__()
        self.called, self.read = nn.Linear(5, 5), nn.Linear(5, 5)
        self.when = when

    def forward(self, x):
        x = torch.tanh(self.called(x.to(self.called.weight.dtype)))
        return F.linear(x, self.read.weight, self.read.bias) if self.training in self.when else self.read(x)


X = normal(3, 5, dtype=torch.float64)


def make(when=(True, False), **settings):
    torch.manual_seed(0)
    settings = {"r": 2, "randlora_alpha": 3, "target_modules": ["called", "read"], **settings}
    return randomize(randlora.get_peft_model(Reads(when).double(), settings))


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*without calling")
        yield


def test_the_first_call_says_so_once():
    model = make()
    with pytest.warns(
        UserWarning, match=r"Reads reads the weights of 1 of its 2 .* \(read\): .*exclude_modules"
    ) as said:
        model(X)
    assert len(said) == 1
    with no_warning():
        model(X)
    with pytest.warns(UserWarning, match="without calling them"):  # models may do it in one mode only
        model.eval()(X)
    with no_warning():
        make(target_modules="all-linear", exclude_modules=["read"])(X)


def test_a_call_that_fails_is_none():
    model = make()
    with no_warning(), pytest.raises(ValueError, match="must have shape"):
        model(X[:, :2])
    with pytest.warns(UserWarning, match="without calling them"):
        model(X)


def test_a_further_adapter_is_looked_at():
    model = make(target_modules=["called"])
    with no_warning():
        model(X)
    model.add_adapter("b", randlora.RandLoraConfig(r=2, target_modules=["read"]))
    with pytest.warns(UserWarning, match=r"1 of its 2 adapted layers .*\(read\)"):
        model(X)


@pytest.mark.parametrize("when", [(True,), (False,)])
def test_in_one_mode_only(when):
    model = make(when)
    for training in (True, False):
        with pytest.warns(UserWarning, match="\\(read\\)") if training in when else no_warning():
            model.train(training)(X)


@pytest.mark.filterwarnings("ignore:Reads reads")
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging(method):
    """Merged, the adapter of a layer that is never called would act all of a sudden."""
    model = make()
    expected = model(X)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'read' cannot be merged into: its model reads the weight of this layer"):
        getattr(model, method)()
    assert_unchanged(model, before)
    nn.init.zeros_(model.model.read.randlora_lambda["default"])  # as training leaves it, starting from zero
    merged = getattr(model, method)() or model
    torch.testing.assert_close(merged(X), expected)


@pytest.mark.filterwarnings("ignore:Reads reads")
def test_merging_what_is_called_after_all():
    model = make(when=(True,))
    model(X)
    expected = model.eval()(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_merged_layers_may_be_read():
    model = make()
    model.merge_adapter()
    with no_warning():
        model(X)


@pytest.mark.parametrize("compiled", ["all", "part", "layer"])
def test_compiled_models_are_not_looked_at(compiled):
    model = make(when=()).eval()
    expected = model(X)
    randlora.layers.bypassed.forget_calls(model)
    part = {"all": model, "part": model.model, "layer": model.model.read}[compiled]
    part.compile(fullgraph=True, backend="eager")
    with no_warning():
        torch.testing.assert_close(model(X), expected)
    model.merge_adapter()


def test_layers_that_nobody_asks_for_are_no_matter():
    """Such as experts that no token is routed to."""

    class Routed(Reads):
        def forward(self, x):
            return self.called(x)

    torch.manual_seed(0)
    model = randomize(randlora.get_peft_model(Routed().double(), {"r": 2, "target_modules": ["called", "read"]}))
    with no_warning():
        model(X)
    model.merge_adapter()


# ---- models of transformers ----


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    speech = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}
    speech |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2} | small
    torch.manual_seed(0)
    return {
        "WavLM": lambda: transformers.WavLMModel(transformers.WavLMConfig(**speech)),
        "Wav2Vec2": lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**speech)),
        "Mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=WORDS, state_size=4)
        ),
        "Llama": lambda: tiny_llama(tie_word_embeddings=True),
        "T5": lambda: transformers.T5ForConditionalGeneration(  # reads the dtypes of weights
            transformers.T5Config(d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2, vocab_size=WORDS)
        ),
        "Mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**small, num_key_value_heads=2, vocab_size=WORDS, num_local_experts=4)
        ),
        "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 40, batch_first=True), 2),
    }[name]().eval()


BYPASSED = {"WavLM": 2 * 4, "Mamba": 2}
NAMES = ["WavLM", "Wav2Vec2", "Mamba", "Llama", "T5", "Mixtral", "torch"]


def call(model, name):
    if name in ("WavLM", "Wav2Vec2"):
        return model(normal(2, 400))[0]
    if name == "torch":
        return model(normal(2, 5, 24))
    ids = torch.randint(3, WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids} if name == "T5" else {}
    return model(input_ids=ids, **more)[0]


@pytest.mark.filterwarnings("ignore:.*(nested|norm_first)")
@pytest.mark.parametrize("name", NAMES)
def test_transformers(name):
    settings = {"r": 4, "randlora_alpha": 3, "target_modules": "all-linear"}
    model = randlora.get_peft_model(transformers_model(name), settings)
    layers = randlora.model.parts.adapted_layers(model.model)
    expectation = (
        pytest.warns(UserWarning, match=f"reads the weights of {BYPASSED[name]} of its {len(layers)} adapted layers")
        if name in BYPASSED
        else no_warning()
    )
    with expectation:
        before = call(model, name)
    found = {path for path, layer in layers.items() if layer.bypassed}
    assert len(found) == BYPASSED.get(name, 0)
    for path in found:  # the adapter has no effect
        randlora.Linear.reset_randlora_parameters(layers[path], "default")
        nn.init.normal_(layers[path].randlora_lambda["default"])
    assert torch.equal(call(model, name), before)
    if found:
        with pytest.raises(ValueError, match="cannot be merged into: its model reads the weight"):
            model.merge_and_unload()
    for path in found:
        nn.init.zeros_(layers[path].randlora_lambda["default"])
    for path in set(layers) - found:
        nn.init.normal_(layers[path].randlora_lambda["default"], std=0.1)
    expected = call(model, name)
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(call(model.merge_and_unload(), name), expected, rtol=1e-3, atol=1e-4)


def test_peft():
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft

    with randlora.integrations.peft.enable():
        config = peft.RandLoraConfig(r=2, randlora_alpha=3, target_modules=["called", "read"], init_weights=False)
        model = peft.get_peft_model(Reads().double(), config)
        with pytest.warns(UserWarning, match=r"reads the weights of 1 of its 2 adapted layers .*read\)"):
            model(X)
        with no_warning():
            model(X)
        with pytest.raises(ValueError, match="its model reads the weight of this layer and never calls"):
            model.base_model.model.read.merge()
        model.add_adapter("b", config)
        with pytest.warns(UserWarning, match="without calling them"):
            model(X)
