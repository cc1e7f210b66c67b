"""Training under FSDP2: the gradients of one process, whatever is mixed, offloaded or computed again."""

import copy
import random
import warnings
from pathlib import Path

import pytest
import torch
from helpers.models import IDS, adapt, add, net
from helpers.ranks import part_of, shard

import randlora
from randlora.names import plain_name

distributed = torch.distributed
pytest.importorskip("torch.distributed.fsdp")

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: E402
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard  # noqa: E402


def step(model, ids=IDS):
    """Gradients of a loss that is a mean over samples."""
    model.zero_grad()
    model(ids).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(sharded, single, tolerance=1e-12, quiet=True):
    """`sharded` on this rank's samples has the gradients of `single` on all of them; `quiet`: without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if quiet else "ignore")
        found = [step(sharded, part_of(IDS)) for _ in range(2)][-1]
    expected = step(single)
    found = {plain_name(name): grad.full_tensor() for name, grad in found.items()}
    assert found.keys() == expected.keys() and len(found) >= 16
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=tolerance, atol=tolerance * grad.abs().max().item())
    assert all(isinstance(p, distributed.tensor.DTensor) for p in sharded.parameters())


def gradients():
    for kind in ("dense", "hadamard", "sparse"):
        model = adapt(net(), kind=kind)
        assert_same_gradients(shard(copy.deepcopy(model)), model)
    assert_same_gradients(fully_shard(copy.deepcopy(model)), model)
    assert_same_gradients(shard(copy.deepcopy(model), reshard_after_forward=False), model)
    # Parts of a block: layers, several as one group, what is inside a layer.
    layers = copy.deepcopy(model)
    for block in layers.model.layers:
        fully_shard(block.q_proj)
        fully_shard([block.up_proj, block.down_proj])
    assert_same_gradients(shard(layers), model)
    inside = copy.deepcopy(model)
    for block in inside.model.layers:
        fully_shard(block.v_proj.base_layer)
    assert_same_gradients(shard(inside), model)
    assert inside.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_gradients_are_those_of_one_process(two_ranks):
    two_ranks(gradients)


def mixed_dtypes():
    # A frozen base in 16 bits beside adapters in fp32 needs no policy: FSDP2 wants one dtype of what is trained.
    model = adapt(net(torch.bfloat16))
    sharded = shard(copy.deepcopy(model))
    assert_same_gradients(sharded, model, tolerance=0.03)
    assert {p.grad.dtype for p in sharded.parameters() if p.grad is not None} == {torch.float32}
    # All in fp32, computed with in 16 bits.
    model = adapt(net(torch.float32))
    sharded = shard(
        copy.deepcopy(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )
    seen = []
    sharded.model.layers[0].q_proj.register_forward_hook(lambda module, args, y: seen.append((args[0].dtype, y.dtype)))
    assert_same_gradients(sharded, model, tolerance=0.05)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in sharded.parameters()} == {torch.float32}
    # What is trained in 16 bits beside fp32 is a group of its own.
    model = adapt(net(torch.bfloat16), modules_to_save=["head"])
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        fully_shard(copy.deepcopy(model))(IDS)
    sharded = copy.deepcopy(model)
    fully_shard(sharded.model.head)
    # torch.nn.Linear returns views, and FSDP2 warns of those that its modules return, unadapted ones too.
    assert_same_gradients(shard(sharded), model, tolerance=0.03, quiet=False)


def test_dtypes_are_mixed(two_ranks):
    two_ranks(mixed_dtypes)


def computed_again():
    single = adapt(net())
    for implementation in (CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT):
        model = adapt(net())
        # Reentrant checkpointing gives no gradients to a block none of whose inputs asks for one.
        model.model.embed.register_forward_hook(lambda module, args, y: y.requires_grad_())
        apply_activation_checkpointing(
            model,
            lambda module, implementation=implementation: checkpoint_wrapper(module, implementation),
            check_fn=lambda module: type(module).__name__ == "Block",
        )
        assert_same_gradients(shard(model), single)
    # The other way round, and single layers within a block.
    for inside in (True, False):
        model = adapt(net())
        if inside:
            apply_activation_checkpointing(
                model, checkpoint_wrapper, check_fn=lambda module: isinstance(module, randlora.Linear)
            )
            shard(model)
        else:
            shard(model)
            apply_activation_checkpointing(
                model, checkpoint_wrapper, check_fn=lambda module: type(module).__name__.endswith("Block")
            )
        assert_same_gradients(model, single)


def test_activations_are_computed_again(two_ranks):
    two_ranks(computed_again)


def offloaded():
    # Between calls the parts are on the CPU anyway; that they are copied to an accelerator is not seen here.
    model = adapt(net())
    assert_same_gradients(shard(copy.deepcopy(model), offload_policy=CPUOffloadPolicy(pin_memory=False)), model)


def test_parts_are_offloaded(two_ranks):
    two_ranks(offloaded)


class Sent:
    """Bytes that a group of FSDP2 gathers and reduces: what :meth:`FSDPModule.set_custom_all_gather` takes."""

    def __init__(self, send):
        self.send, self.nbytes = send, []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, *args, **kwargs):
        self.nbytes.append(max(output_tensor.nbytes, input_tensor.nbytes))
        return self.send(output_tensor, input_tensor, group, *args, **kwargs)


def traffic():
    """What the first block's group sends in one step, and the bytes of its frozen and its trained parameters."""
    model = adapt(net(torch.float32))
    nbytes = {True: 0, False: 0}
    for p in model.model.layers[0].parameters():
        nbytes[p.requires_grad] += 4 * 2 * -(-p.shape[0] // 2) * p[0].numel()  # FSDP2 pads the first axis
    before = _fingerprints(model)
    block = shard(model).model.layers[0]
    gathered = Sent(
        lambda out, part, group, async_op=False: distributed.all_gather_into_tensor(out, part, group, async_op)
    )
    reduced = Sent(
        lambda out, part, group, op, async_op=False: distributed.reduce_scatter_tensor(out, part, op, group, async_op)
    )
    block.set_custom_all_gather(gathered)
    block.set_custom_reduce_scatter(reduced)
    step(model, part_of(IDS))
    return gathered.nbytes, reduced.nbytes, nbytes, before == _fingerprints(model)


def _fingerprints(model):
    layers = [m for m in model.modules() if isinstance(m, randlora.Linear)]
    return [layer.bases["default"].fingerprint(layer.out_features, 13, 4) for layer in layers]


def test_what_is_sent(two_ranks):
    """A block is gathered twice, with its frozen weights; gradients are those of lambda and gamma; no bases."""
    gathered, reduced, nbytes, same_bases = two_ranks(traffic)[0]
    assert gathered == [nbytes[True] + nbytes[False]] * 2
    assert reduced == [nbytes[True]]
    assert same_bases


# ---- everything in any order ----


class Sequence:
    """Random operations on a sharded model and on one that is not: they compute, train and save the same."""

    def __init__(self, folder, seed):
        self.draw, self.folder = random.Random(seed), folder
        self.single = add(adapt(net()), "second", seed=2, kind=self.draw.choice(["dense", "hadamard"]))
        kept = self.draw.choice([None, True, False])
        self.sharded = self.draw.choice([shard, fully_shard])(copy.deepcopy(self.single), reshard_after_forward=kept)
        self.both = self.single, self.sharded

    def some(self):
        return self.draw.sample(["default", "second"], self.draw.choice([1, 2]))

    def call(self):
        with torch.no_grad():
            torch.testing.assert_close(self.sharded(IDS), self.single(IDS))

    def step(self):
        flags = [{name for name, p in model.named_parameters() if p.requires_grad} for model in self.both]
        assert flags[0] == flags[1]
        if any(name.endswith(tuple(self.single.active_adapters)) for name in flags[0]):
            found = [step(model) for model in self.both]
            assert found[0].keys() == found[1].keys()
            for model, gradients in zip(self.both, found, strict=True):
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if name in gradients:
                            p.sub_(0.01 * gradients[name])
                            p.grad = None
        self.call()

    def activate(self):
        names, frozen = self.some(), self.draw.random() < 0.3
        for model in self.both:
            model.set_adapter(names, inference_mode=frozen)

    def flags(self):
        names, flag = self.some(), self.draw.random() < 0.5
        for model in self.both:
            model.set_requires_grad(names, flag)

    def disable(self):
        with self.single.disable_adapter(), self.sharded.disable_adapter():
            self.call()

    def other(self):
        """An adapter that comes and goes."""
        active = self.single.active_adapters
        for model in self.both:
            model.load_adapter(f"{self.folder}/others/third", "third")
        with pytest.raises(ValueError, match="cannot be trained"):
            self.sharded.set_adapter("third")
        with pytest.raises(ValueError, match="cannot be deleted"):
            self.sharded.delete_adapter("second")
        self.call()
        for model in self.both:
            model.set_adapter(["third", *active], inference_mode=True)
        self.call()
        for model in self.both:
            model.set_adapter(active)
            model.delete_adapter("third")

    def save(self):
        self.sharded.save_pretrained(f"{self.folder}/sharded")
        if distributed.get_rank() == 0:
            self.single.save_pretrained(f"{self.folder}/single")
            for path in ("adapter_model.safetensors", "second/adapter_model.safetensors"):
                here, there = (Path(self.folder, kind, path).read_bytes() for kind in ("single", "sharded"))
                assert here == there

    def parts(self):
        for module in self.sharded.modules():
            if isinstance(module, FSDPModule):
                self.draw.choice([module.unshard, module.reshard])()


def any_order(folder, seed):
    if distributed.get_rank() == 0:
        add(adapt(net(), seed=4), "third", seed=5).save_pretrained(f"{folder}/others")
    distributed.barrier()
    sequence, done = Sequence(folder, seed), []
    operations = ["call", "step", "step", "activate", "flags", "disable", "other", "save", "parts"]
    try:
        for _ in range(30):
            done.append(sequence.draw.choice(operations))
            getattr(sequence, done[-1])()
    except BaseException as error:
        raise AssertionError(f"after {done}") from error


def test_any_order(two_ranks, tmp_path):
    for seed in range(3):
        two_ranks(any_order, folder=str(tmp_path), seed=seed)
