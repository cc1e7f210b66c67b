"""RandLoraConfig: PEFT's fields, defaults and JSON form, and errors for what cannot be meant."""

import dataclasses
import json

import pytest
from helpers.common import KINDS
from helpers.models import adapt, net

from randlora import RandLoraConfig, get_peft_model

OWN = {"num_bases", "prng", "strategy", "kind", "sparsity", "group_width", "exclude_modules", "target_parameters"}


def test_fields_and_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    ours = {f.name: f.default for f in dataclasses.fields(RandLoraConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(peft.RandLoraConfig)}
    shared = theirs.keys() & ours.keys()
    assert theirs.keys() - ours.keys() <= {"peft_version"} and ours.keys() - theirs.keys() == OWN
    differ = {name for name in shared if theirs[name] is not dataclasses.MISSING and ours[name] != theirs[name]}
    assert differ <= {"peft_type"}  # PEFT sets it later


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_peft_reads_our_json_and_we_read_pefts(task, tmp_path):
    peft = pytest.importorskip("peft")
    values = {
        "r": 7, "randlora_alpha": 5, "randlora_dropout": 0.25, "target_modules": ["a", "b"], "projection_prng_key": 3,
        "sparse": True, "bias": "all", "modules_to_save": ["c"], "layers_to_transform": [0, 2], "task_type": task,
        "layers_pattern": "h",
    }  # fmt: skip
    RandLoraConfig(**values).save_pretrained(tmp_path / "ours")
    read = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(read, peft.RandLoraConfig)
    for name, value in values.items():
        got = getattr(read, name)
        assert (sorted(got) if isinstance(got, set) else got) == value, name

    peft.RandLoraConfig(**values).save_pretrained(tmp_path / "theirs")
    read = RandLoraConfig.from_pretrained(tmp_path / "theirs")
    for name, value in values.items():
        got = getattr(read, name)
        assert (sorted(got) if name == "target_modules" else got) == value, name


@pytest.mark.parametrize(
    "values",
    [{}, {"kind": "sign", "num_bases": 3, "strategy": "merged"}, {"very_sparse": True, "sparsity": 4.5},
     {"kind": "hadamard"}, {"kind": "hadamard", "group_width": 2},
     {"prng": "peft", "sparse": True}, {"exclude_modules": ["x"], "target_modules": "all-linear"},
     {"projection_prng_key": 2**64 - 1}],
)  # fmt: skip
def test_round_trip(values, tmp_path):
    config = RandLoraConfig(**values)
    config.save_pretrained(tmp_path)
    assert RandLoraConfig.from_pretrained(tmp_path) == config
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert OWN & text.keys() == {key for key in values if key in OWN} | {"prng"}  # without it PEFT wrote the file


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_flags_say_the_same(kind):
    config = RandLoraConfig(kind=kind)
    assert (config.sparse, config.very_sparse) == (kind == "sparse", kind == "very_sparse")
    if kind in ("sparse", "very_sparse"):
        assert RandLoraConfig(**{kind: True}).kind == kind
    assert RandLoraConfig(sparse=True, very_sparse=True).kind == "very_sparse"  # as in PEFT


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.5}, TypeError, "r must"),
        ({"randlora_alpha": "x"}, TypeError, "randlora_alpha"),
        ({"randlora_dropout": 1.5}, ValueError, "randlora_dropout"),
        ({"projection_prng_key": -1}, ValueError, "projection_prng_key"),
        ({"projection_prng_key": 2**64}, ValueError, "projection_prng_key"),
        ({"num_bases": 0}, ValueError, "num_bases"),
        ({"bias": "lora_only"}, ValueError, "randlora_only"),
        ({"kind": "dens"}, ValueError, "kind must be one of dense"),
        ({"kind": "dense", "sparse": True}, ValueError, "contradicts sparse=True"),
        ({"sparsity": 4.0}, ValueError, "no free sparsity"),
        ({"prng": "philo"}, ValueError, "prng must be one of philox"),
        ({"prng": "peft", "kind": "sign"}, ValueError, "got kind='sign'"),
        ({"prng": "peft", "kind": "hadamard"}, ValueError, "got kind='hadamard'"),
        ({"group_width": 4}, ValueError, "kind='dense' has no group width, got group_width=4"),
        ({"kind": "hadamard", "group_width": 16}, ValueError, "group_width must be 8, 4, 2 or 1, got 16"),
        ({"kind": "hadamard", "sparsity": 4.0}, ValueError, "no free sparsity"),
        ({"prng": "peft", "num_bases": 3}, ValueError, "num_bases=3"),
        ({"strategy": "fast"}, ValueError, "strategy must be one of auto"),
        ({"init_weights": "yes"}, TypeError, "init_weights must be True or False"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list of names or a string"),
        ({"target_modules": "*.q_proj"}, ValueError, r"target_modules='\*.q_proj' is not a regular expression"),
        ({"exclude_modules": "("}, ValueError, "exclude_modules="),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "["]}, ValueError, r"layers_pattern='\['"),
        ({"layers_pattern": "h"}, ValueError, "needs layers_to_transform"),
        ({"layers_to_transform": 1.5}, TypeError, "an integer or a list of integers, got 1.5"),
        ({"layers_to_transform": "12"}, TypeError, "got '12'"),
        ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, ValueError, "as a list or 'all-linear'"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of names"),
        ({"task_type": "SEQ_CSL"}, ValueError, "one of CAUSAL_LM"),
        ({"peft_type": "LORA"}, ValueError, "another method's adapter"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_values(values, error, named):
    with pytest.raises(error, match=named):
        RandLoraConfig(**values)


def test_unknown_keys_are_named_with_what_could_be_meant():
    with pytest.raises(ValueError, match=r"target_module: not known .* did you mean target_modules\?"):
        RandLoraConfig.from_dict({"r": 4, "target_module": ["q"]})
    assert RandLoraConfig.from_dict({"r": 4, "of_a_later_peft": None}) == RandLoraConfig(r=4)


def test_of_another_method():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="got 'LORA'"):
        get_peft_model(net(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"must be a randlora\.RandLoraConfig"):
        get_peft_model(net(), 3)


def test_pefts_config_means_pefts_bases():
    peft = pytest.importorskip("peft")
    model = get_peft_model(net(), peft.RandLoraConfig(r=4, target_modules=["q_proj"], very_sparse=True))
    assert model.peft_config["default"].prng == "peft"
    bases = model.model.layers[0].q_proj.bases["default"]
    assert (bases.prng, bases.kind) == ("peft", "very_sparse")


def test_a_config_is_not_changed_by_a_model():
    config = RandLoraConfig(r=4, target_modules=["q_proj", "up_proj"], very_sparse=True, task_type="SEQ_CLS")
    before = dataclasses.asdict(config)
    first, second = adapt(net(), r=4), get_peft_model(net(), config)
    first.add_adapter("b", config)
    assert dataclasses.asdict(config) == before
    first.peft_config["b"].save_projection = False
    assert config.save_projection and second.peft_config["default"].save_projection
