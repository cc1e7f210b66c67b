"""TRL's GRPO with a stand-in for vLLM, which has the merged model of every step, bit for bit, and knows every name.

vLLM itself is in none of these tests: see tests/helpers/servers.py for what stands for it.
"""

import copy

import pytest
import torch
from helpers.models import adapt, add, tiny_llama
from helpers.servers import Server, in_trl
from helpers.trainers import tokenizer

import randlora
from randlora.layers.quantized import dequantize

transformers = pytest.importorskip("transformers")
datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
pytest.importorskip("trl.generation.vllm_generation")

from randlora.integrations.trl import GRPOTrainer, TrainsAdapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SETTINGS = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "modules_to_save": ["norm"]}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
modes = pytest.mark.parametrize("mode", ["colocate", "server"])


def reward(completions, **_):
    """The more "a", the better."""
    return [float(text.split().count("a")) - 0.1 * len(text.split()) for text in completions]


def make(cls, model, folder, **settings):
    arguments = {
        "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5,
        "learning_rate": 0.05, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "bf16": False, "use_vllm": True, "vllm_mode": "colocate",
    }  # fmt: skip
    config = trl.GRPOConfig if issubclass(cls, trl.GRPOTrainer) else trl.RLOOConfig
    return cls(
        model=model, reward_funcs=reward, args=config(output_dir=str(folder), **arguments | settings),
        processing_class=tokenizer(), train_dataset=datasets.Dataset.from_dict({"prompt": ["a b", "c d e"] * 4}),
    )  # fmt: skip


def base_model(folder, dtype=torch.float32, **changes):
    """As from the hub: with a place that the server, too, takes it from."""
    tiny_llama(**changes).to(dtype).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def ours(base, **settings):
    return adapt(base, seed=3, **{"randlora_alpha": 0.5, **SETTINGS, **settings})


def pefts(base):
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft as integration

    with integration.enable():
        return peft.get_peft_model(base, peft.RandLoraConfig(randlora_alpha=8, **SETTINGS))


def merged(model):
    """The weights of a copy that is merged for good."""
    twin = copy.deepcopy(model)
    return {name: value.clone() for name, value in twin.merge_and_unload().state_dict().items()}


def bits_of_base(model):
    state = model.state_dict().items()
    return {n: v.clone().view(torch.uint8) for n, v in state if "randlora_" not in n and "modules_to_save" not in n}


def run(trainer, server):
    """Trains, and gives the merged model at every synchronisation, as of a copy of the trained one."""
    expected, sync = [], trainer.vllm_generation.sync_weights

    def watched():
        expected.append(merged(trainer.model))
        sync()

    trainer.vllm_generation.sync_weights = watched
    trainer.train()
    assert len(expected) == len(server.states) >= 2
    return expected


def assert_in_step(expected, states):
    for wanted, got in zip(expected, states, strict=True):
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            assert torch.equal(value.view(torch.uint8), got[name].view(torch.uint8)), name
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(expected[0][q], expected[-1][q])


@dtypes
@modes
@pytest.mark.parametrize("whose", ["ours", "peft's"])
def test_the_server_has_the_merged_model_of_every_step(tmp_path, monkeypatch, whose, mode, dtype):
    base = base_model(tmp_path, dtype, tie_word_embeddings=mode == "server")
    model = ours(base) if whose == "ours" else pefts(base)
    before, server = bits_of_base(model), Server(tiny_llama(tie_word_embeddings=mode == "server").to(dtype))
    with in_trl(monkeypatch, server):
        trainer = make(GRPOTrainer if whose == "ours" else trl.GRPOTrainer, model, tmp_path / "out", vllm_mode=mode)
        expected = run(trainer, server)
    assert trainer.model is model or whose != "ours"
    assert_in_step(expected, server.states)
    after = bits_of_base(model)
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert server.asked[0][0] == (str(tmp_path) if mode == "colocate" else "http://0.0.0.0:8000")
    # The trained model gives its words the probabilities that the server has drawn them by.
    logged = [e for e in trainer.state.log_history if "sampling/importance_sampling_ratio/mean" in e]
    for entry in logged:
        ratio = entry["sampling/importance_sampling_ratio/mean"]
        assert ratio == pytest.approx(1, abs=1e-3 if dtype == torch.float32 else 0.1)
    assert len(logged) == 2


def no_model(*_, **__):
    raise AssertionError("a second base model was to be loaded")


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_the_reference_is_the_model_as_it_was(tmp_path, monkeypatch, start):
    """With beta: no second base model is loaded, and what the server gets has nothing of the reference."""
    monkeypatch.setattr(trl.trainer.grpo_trainer, "create_model_from_path", no_model)
    base = base_model(tmp_path)
    model = ours(base) if start == "trained" else randlora.get_peft_model(base, {**SETTINGS, "modules_to_save": None})
    server = Server(tiny_llama())
    with in_trl(monkeypatch, server):
        trainer = make(GRPOTrainer, model, tmp_path / "out", beta=0.1)
        assert trainer.beta == trainer.args.beta == 0.1 and not list(trainer.ref_model.parameters())
        assert list(model.peft_config) == ["default", "ref"][: 1 + (start == "trained")]
        expected = run(trainer, server)
    assert_in_step(expected, server.states)
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-4 and model.active_adapters == ["default"]


def test_other_trainers_that_generate_by_vllm(tmp_path, monkeypatch):
    """RLOO, with several adapters of which one is not trained with, and its beta, which is not 0 by default."""

    class RLOOTrainer(TrainsAdapters, trl.RLOOTrainer):
        pass

    monkeypatch.setattr(trl.trainer.rloo_trainer, "create_model_from_path", no_model)
    model = add(ours(base_model(tmp_path, torch.bfloat16)), "b", 5, kind="hadamard", target_modules=["o_proj"])
    add(model, "c", 6).set_adapter(["default", "b"])
    server = Server(tiny_llama().to(torch.bfloat16))
    with in_trl(monkeypatch, server):
        trainer = make(RLOOTrainer, model, tmp_path / "out")
        expected = run(trainer, server)
    assert_in_step(expected, server.states)
    assert set(model.peft_config) == {"default", "b", "c", "ref_default", "ref_b"} and trainer.beta == 0.05


def test_what_vllm_cannot_be_given(tmp_path, monkeypatch):
    base = base_model(tmp_path, tie_word_embeddings=True)
    server = Server(tiny_llama())
    with in_trl(monkeypatch, server):
        tied = ours(base, modules_to_save=["lm_head"])
        with pytest.raises(ValueError, match=r"config ties its output head to its embeddings.*leave it out"):
            make(GRPOTrainer, tied, tmp_path / "out")
        monkeypatch.delattr(trl.generation.vllm_generation.VLLMGeneration, "_iter_named_params")
        with pytest.raises(ValueError, match=r"how TRL .* sends weights to vLLM is not known.*TRL 1.16 is known"):
            make(GRPOTrainer, ours(tied.unload()), tmp_path / "out")
    assert not server.states


def test_quantised_models_are_sent_as_numbers(tmp_path, monkeypatch):
    """In 4 bits the base; the server, of the model in 16 bits, gets what it stands for with the updates added."""
    pytest.importorskip("bitsandbytes")
    changes = {"hidden_size": 64, "intermediate_size": 64}
    base_model(tmp_path, torch.bfloat16, **changes)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )  # fmt: skip
    model, server = ours(base), Server(tiny_llama(**changes).to(torch.bfloat16))
    with in_trl(monkeypatch, server):
        with pytest.raises(ValueError, match=r"quantised to 4 bits.*use vllm_mode='server'"):
            make(GRPOTrainer, model, tmp_path / "out")
        trainer = make(GRPOTrainer, model, tmp_path / "out", vllm_mode="server")
        trainer.train()
    layer = model.model.model.layers[0].self_attn.q_proj
    got = server.states[-1]["model.layers.0.self_attn.q_proj.weight"]
    assert len(server.states) == 2 and got.dtype == torch.bfloat16
    assert not torch.equal(got, server.states[0]["model.layers.0.self_attn.q_proj.weight"])
    trainer.vllm_generation.sync_weights()
    got = server.states[-1]["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(got, (dequantize(layer.base_layer).float() + layer.get_delta_weight("default")).bfloat16())
