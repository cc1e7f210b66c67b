"""Which layers a config means: PEFT's rules, and errors that say what could be meant."""

import warnings

import pytest
import torch
from helpers.models import Net, adapt, assert_unchanged, net, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

import randlora
from randlora import RandLoraConfig
from randlora.model.targets import find_targets

LLAMA = {
    "suffix": {"target_modules": ["q_proj", "gate_proj"]},
    "partly_qualified": {"target_modules": ["layers.0.self_attn.q_proj"]},
    "whole_name_and_head": {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "default": {},
    "one_layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    "no_layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "patterns": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "head_saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "targets_saved": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "down_proj"]},
    "embedding_saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "bias_all": {"target_modules": ["q_proj"], "bias": "all"},
}
CASES = [
    *((tiny_llama, f"llama-{name}", values) for name, values in LLAMA.items()),
    (tiny_gpt2, "gpt2-conv1d", {"target_modules": ["c_attn"]}),
    (tiny_gpt2, "gpt2-all_linear", {"target_modules": "all-linear"}),
    (tiny_gpt2, "gpt2-default", {}),
    (tiny_gpt2, "gpt2-bias", {"target_modules": ["c_attn"], "bias": "randlora_only", "fan_in_fan_out": True}),
    (tiny_bert, "bert-all_linear", {"target_modules": "all-linear"}),
    (tiny_bert, "bert-all_linear-task", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (tiny_bert, "bert-default-task", {"task_type": "SEQ_CLS"}),
]


@pytest.mark.parametrize(("make", "values"), [c[::2] for c in CASES], ids=[c[1] for c in CASES])
def test_same_layers_and_trainable_parameters_as_peft(make, values, capsys):
    peft = pytest.importorskip("peft")
    from peft.tuners.randlora import RandLoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), peft.RandLoraConfig(r=4, **values))
        ours = randlora.get_peft_model(make(), peft.RandLoraConfig(r=4, **values))
    expected = {name for name, m in theirs.base_model.model.named_modules() if isinstance(m, RandLoraLayer)}
    assert set(randlora.model.parts.adapted_layers(ours.model)) == expected and expected
    trained = {name.removeprefix("base_model.model.") for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model.") for name, p in ours.named_parameters() if p.requires_grad} == trained
    theirs.print_trainable_parameters()
    text = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == text and text.startswith("trainable params: ")


def found(model, **values):
    return list(find_targets(model, RandLoraConfig(**values)))


def test_order_is_the_models():
    assert found(Net(), target_modules=["v_proj", "q_proj"], layers_to_transform=1) == [
        "layers.1.q_proj",
        "layers.1.v_proj",
    ]


@pytest.mark.parametrize("wanted", [["0"], ["2"], ["0", "2"], "2", "all-linear"], ids=str)
def test_a_module_used_twice_is_meant_by_each_of_its_names(wanted):
    shared = nn.Linear(3, 3)
    assert found(nn.Sequential(shared, nn.ReLU(), shared), target_modules=wanted) == ["0"]
    with pytest.raises(ValueError, match="matches no layer"):
        found(nn.Sequential(shared, nn.ReLU(), shared), target_modules=wanted, exclude_modules=["2"])


def test_exclude():
    everything = found(Net(), target_modules="all-linear")
    assert len(everything) == 9
    left = found(Net(), target_modules="all-linear", exclude_modules=["layers.0.q_proj", "head"])
    assert left == [name for name in everything if name not in ("layers.0.q_proj", "head")]
    assert found(Net(), target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == ["layers.1.q_proj"]
    with pytest.warns(UserWarning, match=r"exclude_modules=\['q_prj'\] matches nothing"):
        found(Net(), target_modules=["q_proj"], exclude_modules=["q_prj"])


def test_layers_count_in_lists_that_are_the_model_itself():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)))
    assert found(model, target_modules="all-linear", layers_to_transform=[2]) == ["2.0", "2.1"]
    assert found(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), target_modules="all-linear", layers_to_transform=1
    ) == ["1"]


def test_first_number_of_a_name_counts():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])] * 1)})
    assert found(model, target_modules=["2"], layers_to_transform=[0]) == ["layers.0.2"]
    with pytest.raises(ValueError, match="matches no layer"):
        found(model, target_modules=["2"], layers_to_transform=[2])


# ---- nn.MultiheadAttention ----


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.proj = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

    def forward(self, x):
        return self.proj(self.attn(x, x, x)[0])


def test_attention_counts_as_one_layer():
    assert found(Attention(), target_modules="all-linear") == ["attn", "proj"]
    assert found(Attention(), target_modules="all-linear", exclude_modules=["attn"]) == ["proj"]
    assert found(Attention(), target_modules=["attn"]) == ["attn"]
    assert found(Attention(), target_modules=["out_proj"]) == ["attn.out_proj"]


def test_attention_keeps_its_names_once_adapted():
    model = adapt(Attention(), target_modules=["out_proj"])
    for wanted in ("all-linear", ["attn"], ["out_proj"]):
        assert found(model.model, target_modules=wanted) == found(Attention(), target_modules=wanted)
    model.add_adapter("b", RandLoraConfig(r=2, target_modules="all-linear"))
    assert found(model.model, target_modules="all-linear") == ["attn", "proj"]


def test_attention_and_its_part_together():
    with pytest.raises(ValueError, match=r"'attn.out_proj' and 'attn', which contains it"):
        adapt(Attention(), target_modules=["attn", "out_proj"])


@pytest.mark.parametrize("wanted", [["attn"], ["out_proj"], "all-linear"], ids=str)
def test_attention_that_cannot_be_taken_apart(wanted):
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Attention()
    model.attn = Own(6, 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'attn.*, which cannot be adapted: .*Own has its own forward"):
        adapt(model, target_modules=wanted)
    assert_unchanged(model, before)


# ---- errors ----


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj' matches no layer of this model; did you mean 'q_proj'.*\(its linear"),
        ({"target_modules": ["q_proj", "up"]}, "'up' matches no layer.*did you mean 'up_proj'"),
        ({"target_modules": "q_proj"}, r"a string is a regular expression .* did you mean the list \['q_proj'\]"),
        ({"target_modules": "nothing.*"}, r"target_modules='nothing\.\*' matches no layer .*q_proj, v_proj"),
        ({"target_modules": []}, "at least one layer"),
        ({"target_modules": ["layers"]}, "'layers', a ModuleList, .*; inside it: layers.0.q_proj"),
        ({"target_modules": ["embed"]}, "'embed', a Embedding, which cannot be adapted.*exclude_modules"),
        ({"target_modules": ["q_proj", "1"]}, "'layers.1', a Block"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\] matches no layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules=\['q_proj'\] matches no"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, r"modules_to_save=\['head'\] matches no layer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["haed"]}, "'haed' matches no module"),
        ({}, "target_modules must be given"),
    ],
    ids=str,
)
def test_errors_say_what_could_be_meant_and_change_nothing(values, named):
    plain, adapted = net(), adapt(net())
    for model, call in (
        (plain, lambda config: randlora.get_peft_model(plain, config)),
        (adapted, lambda config: adapted.add_adapter("b", config)),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=named):
            call(RandLoraConfig(r=2, **values))
        assert_unchanged(model, before)


def test_no_linear_layers_at_all():
    with pytest.raises(ValueError, match="which has no layer that could be adapted"):
        found(nn.Sequential(nn.ReLU()), target_modules=["q_proj"])


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.MultiheadAttention(4, 2)], ids=lambda m: type(m).__name__)
def test_a_model_that_is_itself_one_layer(layer):
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"itself one layer.*torch.nn.Sequential\(model\)"):
        randlora.get_peft_model(layer, RandLoraConfig(r=2, target_modules="all-linear"))
    assert_unchanged(layer, before)


def test_lazy_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
    for targets in (["1"], "all-linear"):
        with pytest.raises(ValueError, match="'1' is a lazy layer"):
            found(model, target_modules=targets)
    model(torch.zeros(1, 2))
    assert found(model, target_modules=["1"]) == ["1"]


def test_unknown_architecture_without_targets():
    pytest.importorskip("peft")  # has the table of defaults
    model = tiny_bert()
    model.config.model_type = "nonesuch"
    with pytest.raises(ValueError, match="there is no default for 'nonesuch'"):
        randlora.get_peft_model(model, RandLoraConfig(r=2))
