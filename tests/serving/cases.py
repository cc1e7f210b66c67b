"""A tiny Llama, adapters of it that are exported as LoRA, and what each says to its prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import randlora

WORDS, LENGTH, NEW, PROMPTS, TRIED = 512, 12, 12, 8, 300
# Where two words are as likely, rounding chooses: of the prompts tried, those are taken where the best word is always
# ahead by this.
MARGIN = 0.02
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass
class Case:
    """What one model says."""

    name: str
    about: str
    folder: Path | None  # of LoRA; None for the base model
    prompts: list[list[int]]
    expected: list[list[int]]
    rank: int = 0
    servable: bool = True


def make(folder: Path) -> tuple[Path, list[Case]]:
    """The base model's folder, and the cases, the base model first."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    model = llama()
    model.save_pretrained(base)
    tokenizer(base)
    cases = [Case("base", "no adapter", None, *said(model))]
    for name, (settings, arguments, judge) in ADAPTERS.items():
        adapted = randomized(randlora.get_peft_model(llama(), randlora.RandLoraConfig(**settings)))
        adapted.save_pretrained(folder / "adapters" / name)
        lora = folder / "lora" / name
        result = randlora.export.to_lora(folder / "adapters" / name, lora, base_model=base, **arguments)
        assert result["exact"] == (judge is ours), result
        about = f"{judge.__doc__} rank {result['rank']}, {result['dtype']}, error {result['error']:.2g}"
        cases.append(Case(name, about, lora, *said(judge(adapted, lora)), rank=result["rank"]))
    # Else nothing would be shown by an adapter that is not applied.
    for case in cases[1:]:
        assert said(model, case.prompts)[1] != case.expected, case.name
    return base, cases


def ours(adapted: nn.Module, lora: Path) -> nn.Module:
    """as the adapter itself:"""
    return adapted


def pefts(adapted: nn.Module, lora: Path) -> nn.Module:
    """as PEFT's LoRA of the same file:"""
    return peft.PeftModel.from_pretrained(llama(), lora)


SETTINGS = {"r": 8, "randlora_alpha": 8, "num_bases": 4, "target_modules": EVERYWHERE}
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[nn.Module, Path], nn.Module]]] = {
    "dense": (SETTINGS, {}, ours),
    "sparse": ({**SETTINGS, "kind": "sparse", "num_bases": 3}, {}, ours),
    "hadamard": ({**SETTINGS, "kind": "hadamard", "target_modules": ["q_proj", "down_proj"]}, {}, ours),
    "one layer": ({**SETTINGS, "target_modules": r".*\.1\.mlp\.up_proj"}, {}, ours),
    "truncated": ({**SETTINGS, "num_bases": None}, {"rank": 16}, pefts),
    "energy": ({**SETTINGS, "num_bases": None}, {"energy": 0.8}, pefts),
    "per layer": ({**SETTINGS, "num_bases": None}, {"energy": 0.8, "per_layer": True}, pefts),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=448, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS, max_position_embeddings=256, initializer_range=0.08, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer(folder: Path) -> None:
    """llama.cpp wants one; what it makes of words does not matter, as prompts are numbers."""
    import sentencepiece

    text = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=WORDS, byte_fallback=True,
        model_type="bpe", pad_id=-1, minloglevel=2,
    )  # fmt: skip


def randomized(model: nn.Module) -> nn.Module:
    """Every layer's update is about half as large as its weight."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, randlora.RandLoraLayer):
                lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
                lam.normal_()
                gamma.normal_()
                lam.mul_(0.5 * layer.get_base_layer().weight.norm() / layer.get_delta_weight("default").norm())
    return model.eval()


def said(model: nn.Module, prompts: list[list[int]] | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what follows each, always the likeliest word."""
    generator = torch.Generator().manual_seed(1)
    tried = torch.randint(3, WORDS, (TRIED, LENGTH), generator=generator) if prompts is None else torch.tensor(prompts)
    out = model.generate(
        input_ids=tried, attention_mask=torch.ones_like(tried), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.scores, dim=1).topk(2).values  # [prompts, words, 2]
    kept = torch.arange(len(tried))
    if prompts is None:
        kept = kept[(best[..., 0] - best[..., 1]).amin(dim=1) >= MARGIN][:PROMPTS]
        assert len(kept) == PROMPTS, f"only {len(kept)} prompts without a near tie"
    return tried[kept].tolist(), out.sequences[kept, LENGTH:].tolist()
