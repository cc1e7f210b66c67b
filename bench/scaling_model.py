"""What a rank holds and computes of a Llama, for bench/scaling.py: counted, not measured, and without its weights.

Shapes come from the model on the meta device, an adapter's numbers from :func:`randlora.estimate` on one block of it
(all blocks are alike), activations from a call without numbers: on an H200, 28 blocks with 8 x 1024 tokens kept what is
counted here within 448 of 25 G bytes.

With tensor parallelism a rank has its part of every linear layer's weight, by rows of q, k, v, gate, up, the embedding
and the head, by columns of o and down; norms, lambda and gamma are whole on each. As randlora.distributed does it, a
rank has the rows of B and the columns of A that its shards need, one copy of each part: few rows of B for q, gate, up
and down, all of them for o, k and v, whose shards are columns of A. Dense updates are split as their weights are, but
for one of the two thin products; hadamard's are computed whole on every rank; LoRA has one factor whole and one split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

import randlora
from bench import shapes
from bench.shapes import Shape, Size
from randlora.bases.definition import bases_for_full_rank
from randlora.private_torch import FakeTensorMode, storage_identity

FROZEN, DENSE, HADAMARD, LORA = "frozen", "dense", "hadamard", "LoRA"
METHODS = (DENSE, HADAMARD, LORA)
SPLIT_BY_COLUMNS = ("o_proj", "down_proj")
BF16, FP32 = 2, 4  # bytes
LOGITS = 3 * FP32  # at the loss: their log-probabilities and two gradients


def _llama(name: str, depth: int, width: int, hidden: int, heads: int) -> Shape:
    size = Size(depth, 128256, 8, 1024, torch.bfloat16)

    def make(depth: int, vocab: int) -> torch.nn.Module:
        return shapes._llama(depth, vocab, hidden_size=width, intermediate_size=hidden, num_attention_heads=heads)

    return Shape(name, make, size, size, size, targets="all-linear", width=width, causal=True)


MODELS = {
    shape.name: shape
    for shape in (
        shapes.SHAPES["Llama-3.2-3B"],
        _llama("Llama-3.1-8B", 32, 4096, 14336, 32),
        _llama("Llama-3.1-70B", 80, 8192, 28672, 64),
        _llama("Llama-3.1-405B", 126, 16384, 53248, 128),
        shapes.SHAPES[shapes.TINY],
    )
}
PUBLISHED = tuple(name for name in MODELS if name != shapes.TINY)


class Rows(NamedTuple):
    """A matrix, or vector, as FSDP2 shards it: by rows, of which every rank has equally many, the last ones padding."""

    rows: int
    row_bytes: int

    def whole(self) -> int:
        return self.rows * self.row_bytes

    def sharded(self, ranks: int) -> int:
        return -(-self.rows // ranks) * self.row_bytes


def sharded(tensors: Iterable[Rows], ranks: int) -> int:
    """Bytes that the rank with most of them holds."""
    return sum(tensor.sharded(ranks) for tensor in tensors)


class Part(NamedTuple):
    """Work of a pass over all tokens: products, and how many bytes the inputs and outputs of its layers have."""

    method: str
    forward_multiply_adds: float
    backward_multiply_adds: float
    bytes: float


class Layer(NamedTuple):
    name: str
    in_features: int
    out_features: int

    def split(self, tp: int) -> Layer:
        """A rank's part of it."""
        if self.name in SPLIT_BY_COLUMNS:
            return Layer(self.name, self.in_features // tp, self.out_features)
        return Layer(self.name, self.in_features, self.out_features // tp)


@dataclass(frozen=True)
class Adapter:
    """Of one method: `told` by :func:`randlora.estimate` of one block; the others as :class:`Model` has them.

    `summed`: of each layer, the bytes of gradients that the ranks of tensor parallelism have to add.
    """

    told: Mapping[str, Any]
    trained: tuple[Rows, ...]
    summed: tuple[int, ...]
    bases_bytes: int
    work: Part


@dataclass(frozen=True)
class Model:
    """A rank's part of a model that is called with `tokens` tokens.

    Attributes:
        block, ends: frozen weights of a block; embedding, last norm and head, where it is not the embedding.
        block_work, ends_work: the frozen model's. input_bytes: a block's input. kept_bytes: of a block, for backward.
        loss_bytes: at the loss, from the logits on. adapters: by method.
    """

    name: str
    depth: int
    tokens: int
    block: tuple[Rows, ...]
    ends: tuple[Rows, ...]
    block_work: Part
    ends_work: Part
    input_bytes: int
    kept_bytes: float
    loss_bytes: int
    adapters: Mapping[str, Adapter]


@cache
def describe(name: str, tokens: int, sequence: int, r: int, tp: int = 1) -> Model:
    """`tokens` in sequences of `sequence`; `r`: RandLoRA's rank. LoRA's is the one with as many numbers.

    Raises ``ValueError`` where `tokens` are no whole sequences, or the model cannot be split by `tp`.
    """
    shape = MODELS[name]
    if tokens % sequence:
        raise ValueError(f"tokens must be a multiple of the sequence's {sequence}, got {tokens}")
    module = shape.build(depth=1, device="meta").requires_grad_(False)
    config, d, vocab = module.config, module.config.hidden_size, module.config.vocab_size
    if config.num_key_value_heads % tp:
        raise ValueError(f"{name} has {config.num_key_value_heads} heads of keys, which {tp} ranks cannot share")
    ids = torch.zeros(tokens // sequence, sequence, dtype=torch.long)
    told = randlora.estimate(
        module, randlora.RandLoraConfig(r=r, target_modules="all-linear"), tokens, kinds=[DENSE, HADAMARD],
        device="cuda", inputs={"input_ids": ids},
    )["methods"]  # fmt: skip

    block = module.model.layers[0]
    whole = [
        Layer(path.rpartition(".")[2], layer.in_features, layer.out_features)
        for path, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    layers = [layer.split(tp) for layer in whole]
    weights = [_rows(layer.out_features, layer.in_features, BF16) for layer in layers]
    norms = [_rows(p.shape[0], 1, BF16) for p in block.parameters() if p.dim() == 1]
    ends = [_rows(vocab // tp, d, BF16)] * (1 if config.tie_word_embeddings else 2) + [_rows(d, 1, BF16)]
    product = tokens * sum(layer.in_features * layer.out_features for layer in layers)
    attention = 2 * tokens * sequence * config.num_attention_heads * config.head_dim // tp
    head = tokens * d * vocab // tp
    kept_whole, kept_split = _kept(name, tokens, sequence)
    moved, frozen_moved = _moved(layers, tokens), _moved(whole, tokens)
    kept_bytes = kept_whole + kept_split / tp
    frozen_moved *= kept_bytes / (kept_whole + kept_split)  # what a rank has a part of it moves a part of
    adapters = {
        DENSE: _randlora(told[DENSE], DENSE, whole, r, tokens, tp, moved),
        HADAMARD: _randlora(told[HADAMARD], HADAMARD, whole, r, tokens, tp, _moved(whole, tokens)),
        LORA: _lora(told["lora"], whole, tokens, tp, moved),
    }
    return Model(
        name=name, depth=shape.full.depth, tokens=tokens, block=(*weights, *norms), ends=tuple(ends),
        block_work=Part(FROZEN, product + attention, product + 2 * attention, frozen_moved),
        ends_work=Part(FROZEN, head, head, tokens * (d + vocab // tp) * BF16),
        input_bytes=tokens * d * BF16, kept_bytes=kept_bytes, loss_bytes=tokens * vocab * LOGITS,
        adapters=adapters,
    )  # fmt: skip


def _rows(rows: int, columns: int, element_bytes: int) -> Rows:
    return Rows(rows, columns * element_bytes)


def _moved(layers: Iterable[Layer], tokens: int) -> int:
    """Bytes of all inputs and outputs."""
    return tokens * sum(layer.in_features + layer.out_features for layer in layers) * BF16


def _randlora(
    told: Mapping[str, Any], method: str, layers: list[Layer], r: int, tokens: int, tp: int, moved: int
) -> Adapter:
    trained: list[Rows] = []
    summed: list[int] = []
    for layer in layers:
        m = min(layer.in_features, layer.out_features)
        n = bases_for_full_rank(m, r)
        own = _rows(r, n, FP32), _rows(n, m, FP32)
        trained += own
        summed.append(sum(tensor.whole() for tensor in own))
    forward = told["forward_multiply_adds"]
    backward, bases_bytes = told["multiply_adds"] - forward, told["bases_bytes"]
    if method == DENSE and tp > 1:
        forward, backward, bases_bytes = _parts_of_dense(layers, r, tokens, tp)
    return Adapter(told, tuple(trained), tuple(summed), bases_bytes, Part(method, forward, backward, moved))


def _parts_of_dense(layers: list[Layer], r: int, tokens: int, tp: int) -> tuple[int, int, int]:
    """Multiply-adds forward and backward, and bytes of bases: randlora/distributed/shard_update.py has the formulas."""
    forward = backward = 0
    slices = set()
    for layer in layers:
        n = bases_for_full_rank(min(layer.in_features, layer.out_features), r)
        _, into, out = layer.split(tp)
        wide, P = layer.in_features <= layer.out_features, n * r
        columns, rows = (into, out) if wide else (out, into)  # of A and of B
        slices.add((rows, columns, n))
        forward += min(tokens * P * (into + out), (P + tokens) * into * out)
        thin = 2 * columns + rows * (1 if wide else 2)
        backward += min(tokens * P * thin, 2 * (P + tokens) * into * out)
    return forward, backward, sum(r * columns + rows * n * r for rows, columns, n in slices) * BF16


def _lora(told: Mapping[str, Any], layers: list[Layer], tokens: int, tp: int, moved: int) -> Adapter:
    rank = told["rank"]
    trained, summed, forward = [], [], 0
    for layer in layers:
        part = layer.split(tp)
        A, B = _rows(rank, part.in_features, FP32), _rows(part.out_features, rank, FP32)
        trained += [A, B]
        forward += tokens * rank * (part.in_features + part.out_features)
        summed.append((B if layer.name in SPLIT_BY_COLUMNS else A).whole())
    return Adapter(told, tuple(trained), tuple(summed), 0, Part(LORA, forward, 2 * forward, moved))


# ---- activations ----


@cache
def _kept(name: str, tokens: int, sequence: int) -> tuple[int, int]:
    """Bytes that a frozen block keeps for backward: what every rank has whole, and what tensor parallelism splits."""
    one, two = (_storages(name, depth, tokens // sequence, sequence) for depth in (1, 2))
    config = MODELS[name].build(depth=1, device="meta").config
    heads = config.num_attention_heads, config.num_key_value_heads
    whole = split = 0
    for (shape, size), count in (two - one).items():
        if shape[-1] == config.intermediate_size or (len(shape) > 2 and shape[1] in heads and shape[1] != sequence):
            split += size * count
        else:
            whole += size * count
    return whole, split


def _storages(name: str, depth: int, batch: int, sequence: int) -> Counter[tuple[tuple[int, ...], int]]:
    """Shapes and bytes of what a model of `depth` blocks keeps: seen in a call with fake tensors."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = MODELS[name].build(depth=depth).requires_grad_(False)
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = MODELS[name].loss(model, {"input_ids": ids, "target": ids})
    del loss
    own = {storage_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = {storage_identity(t): (tuple(t.shape), t.untyped_storage().nbytes()) for t in kept}
    return Counter(value for key, value in found.items() if key not in own)
