"""What servers ask of a folder of LoRA, as read in vLLM 0.32 and 0.31 and in llama.cpp: the folders that we write obey.

tests/serving has the servers themselves serve such folders; here their rules are assertions, and no server is needed.
"""

import json
import re

import pytest
import torch
from helpers.common import reference_update
from helpers.models import adapt, layers_of, tiny_llama
from safetensors.torch import load_file

from randlora.export import to_lora
from randlora.export.table import VLLM_RANKS

NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])\.weight")


class Folder:
    """What a server reads of one."""

    def __init__(self, path):
        self.config = json.loads((path / "adapter_config.json").read_text())
        self.tensors = load_file(path / "adapter_model.safetensors")
        self.modules = {}  # name -> {"A": [rank, in], "B": [out, rank]}
        for name, tensor in self.tensors.items():
            match = NAME.fullmatch(name)
            assert match, f"{name}: servers know no such tensor"
            self.modules.setdefault(match["module"], {})[match["which"]] = tensor

    def of_pattern(self, pattern, name, default):
        """A value for one layer: keys of a pattern are the ends of names."""
        found = [value for key, value in self.config[pattern].items() if re.fullmatch(f"(?:.*[.])?(?:{key})", name)]
        return found[0] if found else self.config[default]

    def scaling(self, server, name):
        """What `server` multiplies the product of a layer's matrices with."""
        alpha, r = self.config["lora_alpha"], self.config["r"]
        if server == "vLLM 0.32":  # PEFT's rule
            return self.of_pattern("alpha_pattern", name, "lora_alpha") / self.of_pattern("rank_pattern", name, "r")
        return alpha / (r if server == "vLLM 0.31" else len(self.modules[name]["A"]))

    def product(self, server, name):
        A, B = (self.modules[name][which].double() for which in "AB")
        return self.scaling(server, name) * B @ A


SERVERS = ("vLLM 0.32", "vLLM 0.31", "llama.cpp")


def assert_served(folder, model, dtype=torch.float32):
    """All that is common to the servers; `model` is the adapted one."""
    config = folder.config
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and not config["modules_to_save"]
    assert type(config["r"]) is int and 0 < config["r"] <= max(VLLM_RANKS) and config["lora_alpha"] > 0
    assert type(config["init_lora_weights"]) is bool and not config["use_rslora"] and not config["use_dora"]
    # Settings of PEFT's LoRA that servers refuse, or that mean another computation.
    others = (
        "lora_bias",
        "use_qalora",
        "use_bdlora",
        "layer_replication",
        "alora_invocation_tokens",
        "target_parameters",
    )
    assert not any(config.get(name) for name in others)
    assert isinstance(config["target_modules"], (list, str)) and config["target_modules"]
    layers = layers_of(model)
    assert folder.modules.keys() == layers.keys()
    ranks = {name: folder.of_pattern("rank_pattern", name, "r") for name in layers}
    for name, layer in layers.items():
        A, B = folder.modules[name]["A"], folder.modules[name]["B"]
        assert A.shape == (ranks[name], layer.in_features) and B.shape == (layer.out_features, ranks[name])
        assert A.dtype == B.dtype == dtype and A.isfinite().all() and B.isfinite().all()
    assert max(ranks.values()) == config["r"], "servers make room for r, in every layer"


EXPORTS = {
    "exact": ({"num_bases": 3}, {}),
    "hadamard": ({"num_bases": 2, "kind": "hadamard"}, {}),
    "sparse": ({"num_bases": 2, "kind": "sparse", "target_modules": r".*\.1\.mlp\.up_proj"}, {}),
    "truncated": ({}, {"rank": 8}),
    "a share, padded": ({}, {"energy": 0.7}),
    "16 bits": ({"num_bases": 2}, {"dtype": torch.bfloat16}),
    "lm_head": ({"num_bases": 2, "target_modules": ["lm_head", "q_proj"]}, {}),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_every_server_computes_the_same(case, tmp_path):
    """Layers of one rank, whose scaling is 1 whichever way a server comes to it."""
    settings, arguments = EXPORTS[case]
    model = adapt(tiny_llama(), **settings)
    result = to_lora(model, tmp_path, **arguments)
    folder = Folder(tmp_path)
    assert_served(folder, model, arguments.get("dtype", torch.float32))
    assert not folder.config["rank_pattern"] and not folder.config["alpha_pattern"]
    for name, layer in layers_of(model).items():
        products = [folder.product(server, name) for server in SERVERS]
        assert all(torch.equal(product, products[0]) for product in products)
        row = next(row for row in result["layers"] if row["name"] == name)
        update = reference_update(layer)
        error = ((products[0] - update).norm() / update.norm()).item()
        assert error == pytest.approx(row["error"], rel=0.01, abs=1e-6)
    largest = next(rank for rank in VLLM_RANKS if rank >= folder.config["r"])
    assert f"vLLM: serve it with --enable-lora --max-lora-rank {largest}" in result["notes"]


def test_a_rank_for_each_layer(tmp_path):
    """vLLM, with rank_pattern and before it knew of it, scales as PEFT does; llama.cpp does not, and a note says so."""
    model = adapt(tiny_llama())
    result = to_lora(model, tmp_path, energy=0.7, per_layer=True)
    folder = Folder(tmp_path)
    assert_served(folder, model)
    ranks = {name: len(both["A"]) for name, both in folder.modules.items()}
    assert len(set(ranks.values())) > 1
    for name, rank in ranks.items():
        assert folder.scaling("vLLM 0.32", name) == folder.scaling("vLLM 0.31", name) == 1
        assert (folder.scaling("llama.cpp", name) == 1) == (rank == folder.config["r"])
    assert any(note.startswith("llama.cpp") and "per_layer=False" in note for note in result["notes"])


REFUSED = {
    "bias": ({"bias": "randlora_only", "target_modules": ["q_proj"]}, r"vLLM refuses bias='lora_only'"),
    "modules": ({"modules_to_save": ["lm_head"]}, r"vLLM refuses modules_to_save \(lm_head\)"),
    "a head": ({"modules_to_save": ["score"]}, r"vLLM takes modules_to_save \(score\) from 0.31 on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told(case, tmp_path):
    settings, match = REFUSED[case]
    plain = tiny_llama(attention_bias=True)
    plain.score = torch.nn.Linear(32, 3)
    model = adapt(plain, **settings)
    assert any(re.match(match, note) for note in to_lora(model, tmp_path, rank=8)["notes"])
