"""How each engine lays a model over N GPUs: what a rank holds, and how long a step takes.

A step is `tokens` tokens per GPU whatever the engine is. Ranks that share a model by tensor parallelism or in a
pipeline see the same tokens, so that they take as many calls of `tokens` tokens in turn as there are ranks that share;
a pipeline takes four times as many of a quarter each, one forward and one backward in turn. Blocks are checkpointed:
their inputs are kept, and their forward pass is computed once more.

**Memory.** Bytes of the rank that holds most; the peaks of all parts are added, which is more than any moment has.
Weights in bf16; lambda and gamma (or LoRA's factors), their gradients and Adam's moments in fp32. FSDP2 shards by rows,
so that no rank holds less than one row of a tensor, and what is gathered has as many rows as ranks at least; two blocks
are gathered at a time (the next one is on its way), and the embedding and the head stay gathered. DDP has its gradients
once more, in its buckets. Bases are whole on every rank, but with tensor parallelism, and never travel. Activations:
the inputs of all blocks, and the larger of what a block keeps while its backward runs and of the logits at the loss.

**Time.** A collective over n ranks sends (n - 1) / n of its bytes from each rank, an all-reduce twice that, at the rate
of the slowest link of its ring, with a latency per hop. Per node a ring has the adapters of all its members.

- DDP, ZeRO-2: gradients go while the backward runs, but for the first block's, which are there last.
  ZeRO-2 gathers what it has updated after the step: nothing covers that.
- FSDP2: while a block is computed the next one is gathered, in the backward beside the reduce-scatter of the gradients
  of the one before; a block takes the longer of the two. The first gather of each pass and the last reduce-scatter have
  nothing beside them, nor has that of embedding and head.
- Tensor parallelism: two all-reduces of a block's tokens in every pass, forward again included, and in the backward one
  of each layer's gradients. Nothing covers them.
- Pipeline: p - 1 of (calls + p - 1) turns are idle; tokens are sent beside the computation of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bench import scaling_rates
from bench.scaling_model import FP32, Model, Rows, describe, sharded
from bench.scaling_rates import HOPS, INFINIBAND, LINK_PART, NODE, NVLINK, Rates

GATHERED = 2  # blocks
MICRO = 4  # calls of a pipeline per stage, each with a part of the tokens
ADAM_BYTES = 7 * FP32  # per number: it, its gradient and two moments are read, all but the gradient written
FORWARD_ALL_REDUCES, BACKWARD_ALL_REDUCES = 2, 4  # of tensor parallelism, per block; backward with forward again


class Group(NamedTuple):
    """Ranks of a collective, `per_node` of them on a node at most."""

    size: int
    per_node: int

    def seconds(self, sent: float, trips: int = 1) -> float:
        """For a rank to send so many bytes around the ring, in `trips` rounds."""
        if self.size == 1:
            return 0.0
        network = -(-self.size // self.per_node) - 1
        rate = min(NVLINK, INFINIBAND * self.per_node) if network else NVLINK
        latency = network * HOPS["network"] + (self.size - 1 - network) * HOPS["node"]
        return sent / (rate * LINK_PART) + trips * latency

    def sent(self, nbytes: float) -> float:
        """By each rank, in an all-gather or a reduce-scatter of what is `nbytes` when whole."""
        return (self.size - 1) / self.size * nbytes

    def gather(self, nbytes: float) -> tuple[float, float]:
        """Bytes sent and seconds, of a reduce-scatter, too."""
        return self.sent(nbytes), self.seconds(self.sent(nbytes))

    def all_reduce(self, nbytes: float) -> tuple[float, float]:
        return 2 * self.sent(nbytes), self.seconds(2 * self.sent(nbytes), trips=2)


@dataclass(frozen=True)
class Plan:
    """N = tp x stages x shards x replicas ranks; of ZeRO-2 the states alone are sharded."""

    engine: str
    tp: int = 1
    stages: int = 1
    shards: int = 1
    replicas: int = 1
    states: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.stages * self.shards * self.replicas

    @property
    def sharing(self) -> int:
        """Ranks that see the same tokens."""
        return self.tp * self.stages

    @property
    def shard_group(self) -> Group:
        return Group(self.shards, max(1, NODE // self.sharing))

    @property
    def replica_group(self) -> Group:
        return Group(self.replicas, max(1, NODE // (self.sharing * self.shards)))


def plans(gpus: int, depth: int) -> list[Plan]:
    """The engines that make sense on so many GPUs, a power of two."""
    if gpus == 1:
        return [Plan("one device")]
    node = min(gpus, NODE)
    stages = 1
    while 2 * stages <= gpus and depth // (2 * stages) >= 3:  # at least three blocks a stage
        stages *= 2
    found = [
        Plan("DDP", replicas=gpus),
        Plan("ZeRO-2", replicas=gpus, states=gpus),
        Plan("FSDP2", shards=gpus),
        Plan("TP", tp=node, replicas=gpus // node),
        Plan("pipeline", stages=stages, replicas=gpus // stages),
    ]
    if gpus > NODE:
        found.append(Plan("FSDP2 in a node", shards=NODE, replicas=gpus // NODE))
        found.append(Plan("TP x FSDP2", tp=NODE, shards=gpus // NODE))
    return found


ENGINES = ("one device", "DDP", "ZeRO-2", "FSDP2", "FSDP2 in a node", "TP", "TP x FSDP2", "pipeline")


@dataclass(frozen=True)
class Case:
    """A model in a step of `tokens` tokens per GPU, in sequences of `sequence`; RandLoRA's `r`.

    `checkpointing` False: every block keeps what its backward needs.
    """

    model: str
    tokens: int = 8192
    sequence: int = 1024
    r: int = 32
    checkpointing: bool = True

    def call(self, plan: Plan) -> Model:
        """What a rank of `plan` sees of a call."""
        sequences = self.tokens // self.sequence
        if plan.stages > 1:
            most = max(1, sequences // MICRO)
            sequences = next(count for count in range(most, 0, -1) if sequences % count == 0)
        return describe(self.model, sequences * self.sequence, self.sequence, self.r, plan.tp)


# ---- memory ----

PARTS = ("weights", "trained", "gradients", "adam", "bases", "buffers", "activations", "workspace")


def memory(case: Case, plan: Plan, method: str) -> dict[str, int]:
    """Part -> bytes, of the rank that holds most."""
    model = case.call(plan)
    adapter = model.adapters[method]
    blocks = -(-model.depth // plan.stages)
    trained = blocks * sharded(adapter.trained, plan.shards)
    updated = -(-trained // plan.states)  # ZeRO's shards are flat
    ends = model.ends if plan.stages == 1 else _larger_end(model)
    buffers = trained if plan.replicas > 1 == plan.states else 0
    if plan.shards > 1:
        of_a_block = (*model.block, *adapter.trained)
        buffers = min(GATHERED, blocks) * _padded(of_a_block, plan.shards) + _padded(model.ends, plan.shards)
        buffers += _padded(adapter.trained, plan.shards)  # a block's gradients before they are scattered
    return {
        "weights": blocks * sharded(model.block, plan.shards) + sharded(ends, plan.shards),
        "trained": trained,
        "gradients": updated,
        "adam": 2 * updated,
        "bases": adapter.bases_bytes,
        "buffers": buffers,
        "activations": _activations(case, plan, model, method, blocks),
        "workspace": adapter.told["workspace_bytes"],
    }


def _activations(case: Case, plan: Plan, model: Model, method: str, blocks: int) -> int:
    in_block = model.kept_bytes + model.adapters[method].told["saved_bytes"]
    kept = blocks * (model.input_bytes if case.checkpointing else in_block)
    in_block = in_block if case.checkpointing else 0
    # The first stage of a pipeline holds as many calls as there are stages, the last one a single one and the loss.
    return round(max(plan.stages * kept + in_block, kept + model.loss_bytes))


def _larger_end(model: Model) -> tuple[Rows, ...]:
    """Of a pipeline: the first stage has the embedding, the last one head and norm."""
    return model.ends[0], model.ends[-1]


def _padded(tensors: tuple[Rows, ...], ranks: int) -> int:
    return ranks * sharded(tensors, ranks)


# ---- time ----


class Step(NamedTuple):
    """Of a rank: seconds of computation, of communication (beside computation or not), of the step; bytes sent."""

    computing: float
    communicating: float
    seconds: float
    sent: float


def step(case: Case, plan: Plan, method: str, gpu: str) -> Step:
    rates = scaling_rates.of(gpu)
    model = case.call(plan)
    forward, backward, ends = _passes(case, model, method, rates)
    calls = plan.sharing * case.tokens // model.tokens
    if plan.stages > 1:
        return _pipeline(plan, model, method, rates, forward, backward, ends, calls)

    adapter = model.adapters[method]
    tensor = Group(plan.tp, plan.tp)
    sent, of_tokens = tensor.all_reduce(model.input_bytes)
    summed = [tensor.all_reduce(nbytes) for nbytes in adapter.summed]
    in_forward = FORWARD_ALL_REDUCES * of_tokens
    in_backward = BACKWARD_ALL_REDUCES * of_tokens + sum(seconds for _, seconds in summed)
    sent = (FORWARD_ALL_REDUCES + BACKWARD_ALL_REDUCES) * sent + sum(sent for sent, _ in summed)
    traffic = model.depth * calls * sent
    talking = model.depth * calls * (in_forward + in_backward)
    computing = calls * (model.depth * (forward + backward) + ends)
    forward, backward = forward + in_forward, backward + in_backward

    if plan.shards > 1:
        one, sent, busy = _sharded(plan, model, method, forward, backward, ends)
        seconds, traffic = calls * one, traffic + calls * sent
        talking += calls * busy
    else:
        nbytes = sum(tensor.whole() for tensor in adapter.trained)
        group = plan.replica_group
        sent, of_block = group.gather(nbytes) if plan.states > 1 else group.all_reduce(nbytes)
        whole = model.depth * of_block
        left = max(whole - (model.depth - 1) * backward, of_block)
        seconds = calls * (model.depth * (forward + backward) + ends) + left
        talking, traffic = talking + whole, traffic + model.depth * sent
        if plan.states > 1:
            sent, updated = group.gather(model.depth * nbytes)
            seconds, talking, traffic = seconds + updated, talking + updated, traffic + sent
    adam = _adam(model.depth * sharded(adapter.trained, plan.shards) / plan.states, rates)
    return Step(computing + adam, talking, seconds + adam, traffic)


def _passes(case: Case, model: Model, method: str, rates: Rates) -> tuple[float, float, float]:
    """Seconds of a block's forward and backward, and of both at the ends. The host may decide."""
    parts = model.block_work, model.adapters[method].work
    forward = sum(map(rates.forward_seconds, parts))
    backward = sum(map(rates.backward_seconds, parts)) + (forward if case.checkpointing else 0)
    host = rates.host[method] * (4 / 3 if case.checkpointing else 1)
    longer = max(1.0, host / (forward + backward))
    ends = rates.forward_seconds(model.ends_work) + rates.backward_seconds(model.ends_work)
    return longer * forward, longer * backward, ends


def _sharded(
    plan: Plan, model: Model, method: str, forward: float, backward: float, ends: float
) -> tuple[float, float, float]:  # fmt: skip
    """Seconds, bytes sent and seconds of communication of one call with FSDP2."""
    group, trained = plan.shard_group, model.adapters[method].trained
    weights_sent, gather = group.gather(_padded((*model.block, *trained), plan.shards))
    gradients_sent, scatter = group.gather(_padded(trained, plan.shards))
    copies_sent, reduce = plan.replica_group.all_reduce(sharded(trained, plan.shards))
    ends_sent, ends_gather = group.gather(_padded(model.ends, plan.shards))
    scatter += reduce
    rest = model.depth - 1
    seconds = (
        ends_gather + gather + rest * max(forward, gather) + forward + ends
        + gather + rest * max(backward, gather + scatter) + backward + scatter
    )  # fmt: skip
    sent = ends_sent + model.depth * (2 * weights_sent + gradients_sent + copies_sent)
    return seconds, sent, ends_gather + model.depth * (2 * gather + scatter)


def _pipeline(
    plan: Plan, model: Model, method: str, rates: Rates, forward: float, backward: float, ends: float, calls: int
) -> Step:  # fmt: skip
    blocks = -(-model.depth // plan.stages)
    # Stages are balanced as far as whole blocks can be.
    stage = max(blocks * (forward + backward), (model.depth * (forward + backward) + ends) / plan.stages)
    neighbour = Group(2, 1 if plan.stages > NODE else 2)
    tokens = 2 * neighbour.seconds(model.input_bytes)
    trained = model.adapters[method].trained
    sent, reduce = plan.replica_group.all_reduce(blocks * sum(tensor.whole() for tensor in trained))
    adam = _adam(blocks * sharded(trained, 1), rates)
    turns = calls + plan.stages - 1
    return Step(
        computing=calls * stage + adam,
        communicating=calls * tokens + reduce,
        seconds=turns * max(stage, tokens) + reduce + adam,
        sent=calls * 2 * model.input_bytes + sent,
    )


def _adam(nbytes: float, rates: Rates) -> float:
    return nbytes / FP32 * ADAM_BYTES / rates.copy
