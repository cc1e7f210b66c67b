"""Models with the sizes of known ones and random weights, and what a training step of them gets.

Targets, batch and sequence are those of the RandLoRA paper's own scripts (github.com/PaulAlbert31/RandLoRA) and of
PEFT's method comparison on MetaMathQA (method_comparison/MetaMathQA in github.com/huggingface/peft), named at each
model. On the CPU depth, vocabulary and batch are reduced until a step takes about half a second on two cores;
:meth:`Shape.title` and the columns of every CSV say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import dtype_name
from bench.methods import Setting

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How much of a model, and of a batch. Immutable; ``dataclasses.replace`` changes it."""

    depth: int
    vocab: int  # 0: a vision model
    batch: int
    tokens: int  # per sample; given by the image's size in vision models
    dtype: torch.dtype


@dataclass(frozen=True)
class Shape:
    """One model.

    Attributes:
        make: depth and vocabulary -> the model, with random weights.
        full: what is published: all layers, all words, the source's batch.
        cpu, cuda: what is measured there unless told otherwise.
        targets: which layers get adapters.
    """

    name: str
    make: Callable[[int, int], nn.Module]
    full: Size
    cpu: Size
    cuda: Size
    targets: Sequence[str] | str
    width: int
    image: int = 0  # pixels of a side
    causal: bool = False  # a language model

    @property
    def batch(self) -> int:
        return self.full.batch

    @property
    def tokens(self) -> int:
        return self.full.tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.full.dtype

    def size(self, device: str, **changes: Any) -> Size:
        """The size for `device`, with those `changes` that are not None."""
        usual = self.cuda if torch.device(device).type == "cuda" else self.cpu
        return dataclasses.replace(usual, **{name: value for name, value in changes.items() if value is not None})

    def setting(self, size: Size | None = None, **changes: Any) -> Setting:
        return Setting(**{"targets": self.targets, "dtype": (size or self.full).dtype} | changes)

    def build(
        self, depth: int | None = None, vocab: int | None = None, *, dtype: torch.dtype | None = None,
        device: str = "cpu", seed: int = 0,
    ) -> nn.Module:  # fmt: skip
        """The model in training mode, without dropout; the same weights every time on one kind of device."""
        usual = torch.get_default_dtype()
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            torch.set_default_dtype(dtype or self.dtype)
            try:
                model = self.make(depth or self.full.depth, self.full.vocab if vocab is None else vocab)
            finally:
                torch.set_default_dtype(usual)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # else no two methods compute the same
        # So that the backward pass goes through all layers, as it does in the middle of a deep model, and ends where
        # gradient checkpointing would have it end.
        model.get_input_embeddings().register_forward_hook(_require_gradient)
        return model.train()

    def inputs(self, size: Size | None = None, device: str = "cpu", seed: int = 0) -> Inputs:
        """What :meth:`loss` takes: random ids or pixels under the names the model has for them, and a target."""
        size = size or self.full
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(size.dtype)

        if self.image:
            inputs = {"pixel_values": random(size.batch, 3, self.image, self.image)}
        else:  # the first ids are special
            shape = (size.batch, size.tokens)
            inputs = {"input_ids": torch.randint(3, size.vocab, shape, generator=generator, device=device)}
        target = inputs["input_ids"] if self.causal else random(size.batch, size.tokens, self.width)
        return inputs | {"target": target}

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Of a language model its own; of the others the mean square of the last hidden state minus a random target.

        (The mean square of the state alone is 1 whatever the weights are, where the last layer is a normalisation.)
        """
        inputs = dict(inputs)
        target = inputs.pop("target")
        if self.causal:
            return model(**inputs, labels=target).loss
        return (model(**inputs).last_hidden_state - target).float().square().mean()

    def title(self, size: Size, training: bool = True) -> str:
        """With everything that is less than published, such as "Llama-3.2-3B (1 of 28 layers), 2 x 210 tokens"."""
        less = []
        if size.depth < self.full.depth:
            less.append(f"{size.depth} of {self.full.depth} layers")
        if size.vocab < self.full.vocab:
            less.append(f"{size.vocab} of {self.full.vocab} words")
        reduced = f" ({', '.join(less)})" if less else ""
        batch = f"{size.batch} x {size.tokens} tokens"
        if training and (size.batch < self.full.batch or size.tokens < self.full.tokens):
            batch += f" (published: {self.full.batch} x {self.full.tokens})"
        return f"{self.name}{reduced}, {batch}, {dtype_name(size.dtype)}"

    def columns(self, size: Size) -> dict[str, Any]:
        """Of the CSV: what :meth:`title` says."""
        return {
            "model": self.name,
            "depth": f"{size.depth}/{self.full.depth}",
            "vocab": f"{size.vocab}/{self.full.vocab}" if size.vocab else "",
            "batch": size.batch,
            "tokens": size.tokens,
            "dtype": dtype_name(size.dtype),
        }


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(torch.is_grad_enabled())


def multiplies_bfloat16(device: str) -> bool:
    """Whether 16-bit products are worth measuring there: a CPU without instructions for them takes ten times fp32's."""
    return torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- the models ----


def _llama(depth: int, vocab: int, **sizes: Any) -> nn.Module:
    import transformers

    # Ids that exist whatever the vocabulary is.
    config = transformers.LlamaConfig(
        num_hidden_layers=depth, vocab_size=vocab, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tiny_llama(depth: int, vocab: int) -> nn.Module:
    return _llama(depth, vocab, hidden_size=64, intermediate_size=96, num_attention_heads=8)


def llama_3b(depth: int, vocab: int) -> nn.Module:
    return _llama(depth, vocab, hidden_size=3072, intermediate_size=8192, num_attention_heads=24,
                  tie_word_embeddings=True)  # fmt: skip


def llama_8b(depth: int, vocab: int) -> nn.Module:
    return _llama(depth, vocab, hidden_size=4096, intermediate_size=14336, num_attention_heads=32)


def roberta(depth: int, vocab: int) -> nn.Module:
    import transformers

    config = transformers.RobertaConfig(
        num_hidden_layers=depth, vocab_size=vocab, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
    )
    return transformers.RobertaModel(config, add_pooling_layer=False)


def minilm(depth: int, vocab: int) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=depth, vocab_size=vocab, hidden_size=384, num_attention_heads=12, intermediate_size=1536
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def vit_b32(depth: int, vocab: int) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(num_hidden_layers=depth, patch_size=32, image_size=224)
    return transformers.ViTModel(config, add_pooling_layer=False)


def clip_l14(depth: int, vocab: int) -> nn.Module:
    """The vision tower, which is what the paper adapts unless it adapts both."""
    import transformers

    config = transformers.CLIPVisionConfig(
        num_hidden_layers=depth, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, patch_size=14,
        image_size=224,
    )  # fmt: skip
    return transformers.CLIPVisionModel(config)


BF16, FP32 = torch.bfloat16, torch.float32
ENCODER_LAYERS = ["query", "key", "value", "dense"]  # the paper's GLUE/run_glue.py

TINY = "tiny Llama"  # to try a script with; no question measures it unless asked to

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "MiniLM-L6",  # sentence-transformers/all-MiniLM-L6-v2, which was trained on 128 tokens a sample
            minilm,
            full=Size(6, 30522, 32, 128, FP32),
            cpu=Size(6, 30522, 16, 128, FP32),
            cuda=Size(6, 30522, 32, 128, FP32),
            targets=ENCODER_LAYERS,
            width=384,
        ),
        Shape(
            "RoBERTa-base",  # the paper's GLUE/train_all.sh: batch 64, 128 tokens
            roberta,
            full=Size(12, 50265, 64, 128, FP32),
            cpu=Size(2, 8192, 8, 128, FP32),
            cuda=Size(12, 50265, 64, 128, FP32),
            targets=ENCODER_LAYERS,
            width=768,
        ),
        Shape(
            "ViT-B/32",  # the paper's vision_language/src/args.py: batch 128, attention and MLP
            vit_b32,
            full=Size(12, 0, 128, 50, FP32),
            cpu=Size(2, 0, 16, 50, FP32),
            cuda=Size(12, 0, 128, 50, FP32),
            targets="all-linear",
            width=768,
            image=224,
        ),
        Shape(
            "CLIP ViT-L/14",  # as ViT-B/32
            clip_l14,
            full=Size(24, 0, 128, 257, FP32),
            cpu=Size(1, 0, 4, 257, FP32),
            cuda=Size(24, 0, 64, 257, FP32),
            targets="all-linear",
            width=1024,
            image=224,
        ),
        Shape(
            "Llama-3.2-3B",  # PEFT's MetaMathQA: bf16, batch 4, about 210 tokens a sample, PEFT's default targets
            llama_3b,
            full=Size(28, 128256, 4, 210, BF16),
            cpu=Size(1, 4096, 2, 210, BF16),
            cuda=Size(28, 128256, 4, 210, BF16),
            targets=["q_proj", "v_proj"],
            width=3072,
            causal=True,
        ),
        Shape(
            "Llama-3-8B",  # the paper's commonsense_reasoning/base_randlora.sh: batch 16, cut off at 256 tokens
            llama_8b,
            full=Size(32, 128256, 16, 256, BF16),
            cpu=Size(1, 4096, 1, 256, BF16),
            cuda=Size(4, 128256, 16, 256, BF16),
            targets=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            width=4096,
            causal=True,
        ),
        Shape(
            TINY,
            tiny_llama,
            full=Size(2, 256, 2, 16, BF16),
            cpu=Size(2, 256, 2, 16, BF16),
            cuda=Size(2, 256, 2, 16, BF16),
            targets=["q_proj", "v_proj"],
            width=64,
            causal=True,
        ),
    )
}
PUBLISHED = tuple(name for name in SHAPES if name != TINY)
