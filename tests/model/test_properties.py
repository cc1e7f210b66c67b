"""Any models, adapters and order of operations: the output is the float64 formula of what should act."""

import tempfile
import warnings

import pytest
import torch
from helpers.common import KINDS, normal
from helpers.models import merged_by_hand, numbered, randomize
from torch import nn

import randlora
from randlora import RandLoraConfig, RandLoraModel

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

few = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip

LAYERS = 3
sizes = st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 21]), min_size=LAYERS + 1, max_size=LAYERS + 1)
configs = st.fixed_dictionaries(
    {
        "r": st.sampled_from([1, 2, 3, 5, 30]),
        "kind": st.sampled_from(KINDS),
        "projection_prng_key": st.sampled_from([0, 1, 2**64 - 1]),
        "num_bases": st.sampled_from([None, None, 1, 4]),
        "randlora_alpha": st.sampled_from([1, 2.5]),
        "target_modules": st.sets(st.sampled_from(["0", "1", "2"]), min_size=1).map(sorted),
    }
)
some = st.integers(0, 7)  # bits: which of the adapters that there are
steps = st.one_of(
    st.tuples(st.just("add"), configs),
    st.tuples(st.sampled_from(["set", "merge"]), some),
    st.tuples(st.sampled_from(["delete", "copy"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(["unmerge", "switch", "mixed"]), st.none()),
)


class Chain(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        for i in range(LAYERS):
            self.add_module(str(i), nn.Linear(sizes[i], sizes[i + 1]))

    def forward(self, x):
        for i in range(LAYERS):
            x = torch.tanh(self.get_submodule(str(i))(x))
        return x


class Machine:
    """A model and, beside it, what should act."""

    def __init__(self, sizes, config):
        self.plain = numbered(Chain(sizes).double())
        model = numbered(Chain(sizes).double())
        self.x = normal(4, sizes[0], seed=7, dtype=torch.float64)
        self.model = randomize(randlora.get_peft_model(model, RandLoraConfig(**config), "a0"), "a0", 1)
        self.names, self.active, self.merged, self.enabled = ["a0"], ["a0"], [], True
        self.made = 1

    def some(self, bits):
        return [name for i, name in enumerate(self.names) if bits >> i & 1]

    def new(self):
        self.made += 1
        return f"a{self.made - 1}"

    def targets_are_merged(self, targets):
        return any(layer.merged for path, layer in self.layers().items() if path in targets)

    def layers(self):
        return randlora.model.parts.adapted_layers(self.model.model)

    def joins(self, name):
        self.names.append(name)
        self.active = self.active or [name]

    # ---- steps ----

    def add(self, config):
        name = self.new()
        if self.targets_are_merged(config["target_modules"]):
            with pytest.raises(ValueError, match="merged"):
                self.model.add_adapter(name, config)
        else:
            self.model.add_adapter(name, RandLoraConfig(**config))
            randomize(self.model, name, self.made)
            self.joins(name)

    def copy(self, index):
        """Saved and loaded under another name, and into a model of its own."""
        if not self.names:
            return
        source, name = self.names[index % len(self.names)], self.new()
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, [source])
            folder = folder if source == "default" else f"{folder}/{source}"
            alone = RandLoraModel.from_pretrained(numbered(like(self.plain)), folder)
            expected = merged_by_hand(self.plain, self.model, [source]) if not self.merged else None
            if expected is not None:
                torch.testing.assert_close(alone(self.x), expected(self.x), rtol=1e-9, atol=1e-9)
            if self.targets_are_merged(self.model.peft_config[source].target_modules):
                with pytest.raises(ValueError, match="merged"):
                    self.model.load_adapter(folder, name)
            else:
                self.model.load_adapter(folder, name)
                self.joins(name)

    def set(self, bits):
        self.model.set_adapter(self.some(bits))
        self.active, self.merged = self.some(bits), []

    def merge(self, bits):
        self.model.merge_adapter(self.some(bits))
        self.merged += [name for name in self.some(bits) if name not in self.merged]

    def unmerge(self, _):
        self.model.unmerge_adapter()
        self.merged = []

    def delete(self, index):
        if not self.names:
            return
        name = self.names[index % len(self.names)]
        if name in self.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        self.names.remove(name)
        self.active = self.names[:1] if self.active == [name] else [n for n in self.active if n != name]

    def switch(self, _):
        self.enabled = not self.enabled
        (self.model.enable_adapter_layers if self.enabled else self.model.disable_adapter_layers)()

    def mixed(self, _):
        if self.merged or not self.names:
            return
        names = [*self.names, "__base__"] * 4
        got = self.model(self.x, adapter_names=names[: len(self.x)])
        for i, name in enumerate(names[: len(self.x)]):
            acting = [name] if self.enabled and name != "__base__" else []
            self.close(got[i], merged_by_hand(self.plain, self.model, acting)(self.x[i]))

    # ---- what must hold after each ----

    def check(self):
        assert list(self.model.peft_config) == self.names and self.model.active_adapters == self.active
        acting = list(dict.fromkeys(self.active + self.merged)) if self.enabled else []
        expected = merged_by_hand(self.plain, self.model, acting)(self.x)
        self.close(self.model(self.x), expected)
        with torch.no_grad():
            self.model.eval()
            for _ in range(2):  # the second call is a cached update's
                self.close(self.model(self.x), expected)
            self.model.train()
        if not self.enabled:
            self.merged = []  # disabled layers give their weight back at the next call
        trained = {name.rpartition(".")[2] for name, p in self.model.named_parameters() if p.requires_grad}
        assert trained <= set(self.active if self.enabled else [])

    def close(self, got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def like(plain):
    return Chain(
        [plain.get_submodule("0").in_features, *(plain.get_submodule(str(i)).out_features for i in range(LAYERS))]
    ).double()


FIRST = {
    "r": 2,
    "kind": "dense",
    "projection_prng_key": 0,
    "num_bases": None,
    "randlora_alpha": 1,
    "target_modules": ["1"],
}


@few
@example([3, 5, 2, 8], FIRST, [("add", FIRST), ("merge", 1), ("set", 2), ("copy", 1), ("mixed", None)])
@example(
    [3, 5, 2, 8], FIRST, [("merge", 1), ("switch", None), ("add", FIRST | {"r": 5}), ("switch", None), ("mixed", None)]
)
@example(
    [3, 5, 2, 8], FIRST, [("delete", 0), ("add", FIRST | {"target_modules": ["0", "1", "2"]}), ("copy", 0), ("set", 3)]
)
@given(sizes, configs, st.lists(steps, min_size=3, max_size=9))
def test_any_order_of_operations(sizes, config, todo):
    machine = Machine(sizes, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        machine.check()
        for name, argument in todo:
            getattr(machine, name)(argument)
            machine.check()
        machine.unmerge(None)
        machine.check()
    for parameter, before in zip(machine.model.unload().parameters(), machine.plain.parameters(), strict=True):
        assert torch.equal(parameter, before)


@few
@given(sizes, configs, configs, st.booleans())
def test_merge_and_unload(sizes, first, second, both):
    machine = Machine(sizes, first)
    machine.add(second)
    names = ["a0", "a1"] if both else ["a1"]
    expected = merged_by_hand(machine.plain, machine.model, names)(machine.x)
    merged = machine.model.merge_and_unload(adapter_names=names)
    assert merged.state_dict().keys() == machine.plain.state_dict().keys()
    machine.close(merged(machine.x), expected)
