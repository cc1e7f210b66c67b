"""Regular expressions of a config, from a file or not: what they mean is what ``re`` says, and matching ends."""

import faulthandler
import re
import sys
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from helpers.damaged import TARGETS, assert_refused, edit_config, make_adapters
from helpers.models import adapt, assert_unchanged, net, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import expressions
from randlora.expressions import Expression

NAMES = ["model.layers.0.self_attn.q_proj", "layers.10.up_proj", "head", "a.b", "", "q_proj", "Layers.1"]
# re tries more combinations than there is time for.
SLOW = [
    "(.|.)*!",
    "(.|.)*[!?]",
    "(.|.)" * 40 + "[!?]",
    "(?:.{1,90}){1,90}[!?]",
    "((?:.|.)*?)*[!?]",
    r"(?:(.)|\1|.)*[!?]",
    r"(?:(?=(.|.)*[?!])|.)*[?!]",
    "(?:(?:(?:.{1,1000}){1,1000}){1,1000})[!?]",
]
SETTINGS = [
    lambda pattern: {"target_modules": pattern},
    lambda pattern: {"target_modules": ["q_proj", "up_proj"], "exclude_modules": pattern},
    lambda pattern: {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": pattern},
    lambda pattern: {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [pattern, "layers"]},
]


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    """Less than users have; and a match that does not end ends the tests."""
    monkeypatch.setattr(expressions, "SECONDS", 0.2)
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


class Deep(torch.nn.Module):
    """Modules with long names, as slow expressions need."""

    def __init__(self):
        super().__init__()
        inner = torch.nn.Sequential(torch.nn.Linear(3, 3))
        for _ in range(12):
            inner = torch.nn.ModuleDict({"layers_of_a_model": inner})
        self.layers = torch.nn.ModuleList([inner, torch.nn.ModuleDict({"q_proj": torch.nn.Linear(3, 3)})])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("pattern", SLOW)
def test_matching_ends(pattern, setting):
    """In a plain call, whatever the setting; nothing is changed."""
    model = Deep()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an exclusion matches nothing
        try:
            randlora.get_peft_model(model, randlora.RandLoraConfig(r=1, **setting(pattern)))
        except ValueError as error:
            assert re.search("takes more than|matches no", str(error))
            assert_unchanged(model, before)


def test_the_message_and_another_thread():
    """Not by a signal, which the main thread alone gets; and other threads run on meanwhile."""
    caught, ticks = [], []

    def adapting():
        try:
            randlora.get_peft_model(Deep(), {"r": 1, "target_modules": "(.|.)*[!?]"})
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=adapting)
    thread.start()
    while thread.is_alive():
        ticks.append(1)
        thread.join(0.001)
    assert "target_modules='(.|.)*[!?]' takes more than 0.2 seconds" in caught[0]
    assert len(ticks) > 3, "the interpreter was held up"


@pytest.mark.parametrize("pattern", SLOW[1:4])
def test_of_a_file(tmp_path, pattern):
    root = make_adapters(tmp_path)
    for name in ("ours", "peft"):
        edit_config(root / name, target_modules=pattern)
        assert_refused(root / name, "takes more than|does not fit this model", Deep)
        edit_config(root / name, target_modules=["q_proj"], exclude_modules=pattern)
        assert_refused(root / name, "takes more than|does not fit this model", Deep)


# The third is deeper than Python's limit, also than the one to which torch's inductor raises it in a process.
@pytest.mark.parametrize(
    "pattern", ["(", "(" * 5000, "(?:" * 3000 + ")*" * 3000, "a{" + "9" * 30 + "}", "[", "*", r"\p{L}", "(?R)"]
)
def test_what_is_no_expression(pattern, tmp_path):
    for setting in SETTINGS:
        with pytest.raises(ValueError, match="is not a regular expression"):
            randlora.RandLoraConfig(r=1, **setting(pattern))
    adapt(net(), **TARGETS).save_pretrained(tmp_path)
    edit_config(tmp_path, target_modules=pattern)
    assert_refused(tmp_path, "target_modules=.* is not a regular expression")


@pytest.mark.parametrize("pattern", ["(?:q_prj){e<=2}", "q{x}", "{e}", r"a\\{e}"])
def test_braces_that_regex_reads_otherwise(pattern):
    with pytest.raises(ValueError, match="brace that is no count"):
        randlora.RandLoraConfig(target_modules=pattern)
    Expression("target_modules", r"a\{e\}|b{2}|c{1,}|d{,3}|e{1,2}?")


PIECES = [*"abqLl01_.-", r"\.", r"\d", r"\w", r"\s", r"\b", "[a-q]", "[^.]", "(?i:q)", "^", "$", r"\Z"]
pieces = st.sampled_from([*PIECES, "proj", "layers", "(?!a)", "(?<=q)"])
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}", "{,3}"])).map(
            lambda t: f"(?:{t[0]}){t[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pattern=patterns, name=st.sampled_from(NAMES) | st.text("alq_.01", max_size=8))
def test_it_means_what_re_says(pattern, name):
    """Among these are no slow ones."""
    expected, found = re.fullmatch(pattern, name), Expression("target_modules", pattern).fullmatch(name)
    assert (expected is None) == (found is None)
    expected, found = re.match(pattern, name), Expression("target_modules", pattern).match(name)
    assert (expected and expected.group()) == (found and found.group())


def test_groups_of_a_layers_pattern():
    """The index is found whatever groups come before it."""
    model = adapt(net(), target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="(layers|blocks)")
    assert [name for name, m in model.model.named_modules() if hasattr(m, "randlora_lambda")] == ["layers.1.q_proj"]


# ---- under PEFT, whose RandLoRA has no exclude_modules ----


@pytest.mark.parametrize("expression", SLOW[1:4])
def test_peft_does_not_hang_either(expression, monkeypatch):
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft

    monkeypatch.setattr(expressions, "SECONDS", 0.2)
    model = nn.Sequential(OrderedDict({"a" * 40: nn.Linear(6, 8)}))
    config = peft.RandLoraConfig(r=2, target_modules=expression)
    with (
        randlora.integrations.peft.enable(),
        pytest.raises(ValueError, match=r"takes more than 0\.2 s|No layers types"),
    ):
        peft.get_peft_model(model, config)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("arguments", [
    {"target_modules": r".*\.[02]\.(up|down)"},
    {"target_modules": r".*\.(up|down)", "layers_to_transform": [1]},  # which PEFT does not look at here
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": "all-linear"},
    {"target_modules": "nothing"},
], ids=str)  # fmt: skip
def test_peft_means_the_same_layers(arguments):
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft

    def names():
        layers = [nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(3)]
        model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        try:
            adapted = peft.get_peft_model(model, peft.RandLoraConfig(r=2, **arguments))
        except ValueError as error:
            return str(error)
        return {name.rpartition(".randlora_")[0] for name, _ in adapted.named_parameters() if "randlora_lambda" in name}

    expected = names()
    with randlora.integrations.peft.enable():
        assert names() == expected
