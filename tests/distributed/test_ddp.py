"""DistributedDataParallel around adapted models: one process's gradients, and nothing sent but them."""

import contextlib

import pytest
import torch
from helpers.models import CLASSES, IDS, adapt, add, net
from helpers.ranks import part_of
from torch import nn
from torch.utils.checkpoint import checkpoint

distributed = torch.distributed
DDP = nn.parallel.DistributedDataParallel

KINDS = {
    "dense": {},
    "hadamard": {"kind": "hadamard"},
    "very_sparse": {"kind": "very_sparse", "sparsity": 10.0},
    "with biases and a module": {"bias": "all", "modules_to_save": ["head"]},
}
TARGETS = torch.randn(4, 5, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def loss_of(model, ids, targets):
    return nn.functional.mse_loss(model(ids).to(targets.dtype), targets)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())
        assert gradient.abs().max() > 0, name


def whole_batch(**settings):
    model = adapt(net(), **settings)
    loss_of(model, IDS, TARGETS).backward()
    return gradients(model)


class Sent:
    """What a rank sends while this lasts: lists of the numbers of elements, by collective."""

    def __enter__(self):
        self.profile = torch.profiler.profile(record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        self.counts = {}
        for event in self.profile.events():
            if event.name.startswith("gloo:"):
                count = sum(torch.Size(shape).numel() for shape in event.input_shapes)
                self.counts.setdefault(event.name.removeprefix("gloo:"), []).append(count)


def counting(buckets, bucket):
    """A hook of DDP's for the communication of gradients, which notes their bytes."""
    buckets.append(bucket.buffer().nbytes)
    work = distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


# ---- gradients and traffic ----


def steps_of(settings, wrap, steps):
    model = adapt(net(), **settings)
    layer = model.model.layers[0].q_proj
    held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found, buckets = [], []
    with Sent() as sent:
        ddp = DDP(model, **wrap)
        ddp.register_comm_hook(buckets, counting)
        for _ in range(steps):
            ddp.zero_grad()
            loss_of(ddp, part_of(IDS), part_of(TARGETS)).backward()
            found.append(gradients(ddp))
    # The bases are there, of each rank's making, and are nothing that DDP knows.
    assert not held & {t.data_ptr() for t in (layer.randlora_A["default"], layer.randlora_B["default"])}
    return found, buckets, sent.counts, layer.bases["default"].fingerprint(22, 13, 4)


@pytest.mark.parametrize(
    "kind, wrap",
    [*((kind, {}) for kind in KINDS), ("dense", {"static_graph": True, "gradient_as_bucket_view": True})],
    ids=[*KINDS, "static graph"],
)
def test_gradients_are_those_of_one_process_and_all_that_is_sent(two_ranks, kind, wrap):
    expected = whole_batch(**KINDS[kind])
    model = adapt(net(), **KINDS[kind])
    numbers, steps = sum(p.numel() for p in trained(model).values()), 3
    all_numbers = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    bases = model.model.layers[0].q_proj.bases["default"]
    for found, buckets, sent, fingerprint in two_ranks(steps_of, settings=KINDS[kind], wrap=wrap, steps=steps):
        assert len(found) == steps
        for gradients_of_step in found:
            close(gradients_of_step, expected)
        assert sum(buckets) == steps * numbers * 8
        # The rule for a static graph is told by a number for each parameter, once.
        assert sum(sent.pop("all_reduce")) == steps * numbers + len(expected) * bool(wrap)
        # When it is made, DDP itself sends all parameters from rank 0 (in bytes), the frozen ones too, and there is a
        # little more in the first two steps: what compares the ranks, the order of the buckets.
        assert sum(sent.pop("broadcast")) <= all_numbers * 8 + 1000 and sum(sent.pop("all_gather")) < 500
        assert not sent
        assert fingerprint == bases.fingerprint(22, 13, 4)


def accumulated():
    ddp, buckets, counts = DDP(adapt(net())), [], []
    ddp.register_comm_hook(buckets, counting)
    halves = list(zip(part_of(IDS).chunk(2), part_of(TARGETS).chunk(2), strict=True))
    for _ in range(2):
        ddp.zero_grad()
        for i, (ids, targets) in enumerate(halves):
            with ddp.no_sync() if i == 0 else contextlib.nullcontext():
                (loss_of(ddp, ids, targets) / 2).backward()
            counts.append(sum(buckets))
    return gradients(ddp), counts


def test_gradient_accumulation(two_ranks):
    expected = whole_batch()
    nbytes = sum(gradient.nbytes for gradient in expected.values())
    for found, counts in two_ranks(accumulated):
        close(found, expected)
        assert counts == [0, nbytes, nbytes, 2 * nbytes]


# ---- which adapters are trained ----


def one_of_two(when, **wrap):
    model = adapt(net())
    with_second = {"seed": 2, "kind": "hadamard", "r": 3}
    if when == "before":
        add(model, "second", **with_second)
        model.set_adapter("second")
    ddp = DDP(model, **wrap)
    for i in range(2):
        if when == "between" and i == 1:
            add(model, "second", **with_second)
        ddp.zero_grad()
        loss_of(ddp, part_of(IDS), part_of(TARGETS)).backward()
    found = gradients(ddp)
    model.set_adapter("second")
    message = None
    try:
        ddp(IDS)
    except ValueError as error:
        message = str(error)
    again = DDP(model, **wrap)
    again.zero_grad()
    loss_of(again, part_of(IDS), part_of(TARGETS)).backward()
    return found, message, gradients(again)


@pytest.mark.parametrize("wrap", [{}, {"find_unused_parameters": True}], ids=["plain", "unused"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_of_several_adapters_the_active_one_is_trained(two_ranks, when, wrap):
    """Whichever was active when DDP was put around the model; for another DDP has to be put around it again."""
    first = whole_batch()
    model = add(adapt(net()), "second", seed=2, kind="hadamard", r=3)
    model.set_adapter("second")
    loss_of(model, IDS, TARGETS).backward()
    second = gradients(model)
    for found, message, again in two_ranks(one_of_two, when=when, **wrap):
        close(found, second if when == "before" else first)
        close({name: gradient for name, gradient in again.items() if name in second}, second)
        if when == "before":
            assert message is None
        else:
            assert "would not be averaged over the ranks" in message and "randlora_lambda.second" in message


def switched(names, find_unused_parameters):
    """Two adapters that add up are trained, then these `names`."""
    model = add(adapt(net()), "second", seed=2)
    model.set_adapter(["default", "second"])
    ddp = DDP(model, find_unused_parameters=find_unused_parameters)
    messages = []
    with model.disable_adapter():
        ddp(IDS)
    for now in (["default", "second"], names, ["default", "second"]):
        model.set_adapter(now)
        ddp.zero_grad()
        try:
            loss_of(ddp, part_of(IDS), part_of(TARGETS)).backward()
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    with torch.no_grad(), model.disable_adapter():
        ddp(IDS)
    ddp.zero_grad()
    loss_of(ddp, part_of(IDS), part_of(TARGETS)).backward()
    return messages, gradients(ddp)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_adapters_are_frozen_inside_ddp(two_ranks, find_unused_parameters):
    model = add(adapt(net()), "second", seed=2)
    model.set_adapter(["default", "second"])
    loss_of(model, IDS, TARGETS).backward()
    expected = gradients(model)
    answers = two_ranks(switched, names=["second"], find_unused_parameters=find_unused_parameters)
    for messages, found in answers:
        close(found, expected)
        assert messages[0] is None and messages[2] is None
        if find_unused_parameters:
            assert messages[1] is None
        else:
            assert "would wait for gradients of" in messages[1] and "randlora_lambda.default" in messages[1]


NAMES = ["default", "default", "second", "__base__"]


def mixed_batch():
    model = add(adapt(net()), "second", seed=2)
    model.set_adapter(["default", "second"])
    ddp = DDP(model, find_unused_parameters=True)
    for _ in range(2):
        ddp.zero_grad()
        names = NAMES[:2] if distributed.get_rank() == 0 else NAMES[2:]
        nn.functional.mse_loss(ddp(part_of(IDS), adapter_names=names), part_of(TARGETS)).backward()
    return gradients(ddp)


def test_a_batch_with_an_adapter_per_sample(two_ranks):
    """Not every rank has samples of every adapter, so that DDP has to look for unused parameters."""
    model = add(adapt(net()), "second", seed=2)
    model.set_adapter(["default", "second"])
    nn.functional.mse_loss(model(IDS, adapter_names=NAMES), TARGETS).backward()
    for found in two_ranks(mixed_batch):
        close(found, gradients(model))


# ---- what else happens in a training step ----


class Checkpointed(nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        x = x if x.requires_grad else x.requires_grad_()
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def checkpointed(reentrant, p):
    model = adapt(net(), randlora_dropout=p)
    for i, block in enumerate(model.model.layers if reentrant is not None else ()):
        model.model.layers[i] = Checkpointed(block, reentrant)
    ddp = DDP(model)
    return [step_with_masks(ddp, seed) for seed in (distributed.get_rank(), 5)]


def step_with_masks(model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    loss_of(model, part_of(IDS), part_of(TARGETS)).backward()
    return {name.replace("block.", ""): gradient for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("reentrant, p", [(None, 0.3), (False, 0.0), (False, 0.3), (True, 0.0), (True, 0.3)])
def test_dropout_and_activation_checkpointing(two_ranks, reentrant, p):
    model = adapt(net(), randlora_dropout=p)
    first, second = two_ranks(checkpointed, reentrant=reentrant, p=p)
    for i, seeds in enumerate(((0, 1), (5, 5))):
        halves = []
        for half, seed in enumerate(seeds):
            torch.manual_seed(seed)
            model.zero_grad()
            loss_of(model, IDS.chunk(2)[half], TARGETS.chunk(2)[half]).backward()
            halves.append(gradients(model))
        expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
        close(first[i], expected)
        for name, gradient in first[i].items():
            assert torch.equal(gradient, second[i][name]), name
    if p:
        assert any(not torch.equal(first[0][name], first[1][name]) for name in first[0])


def mixed():
    model = adapt(net(torch.bfloat16), kind="hadamard")
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    ddp, buckets = DDP(model), []
    ddp.register_comm_hook(buckets, counting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(ddp, part_of(IDS), part_of(TARGETS).float()).backward()
    return gradients(ddp), sum(buckets)


def test_a_16_bit_base_under_autocast(two_ranks):
    model = adapt(net(torch.bfloat16), kind="hadamard")
    halves = []
    for half in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model, IDS.chunk(2)[half], TARGETS.chunk(2)[half].float()).backward()
        halves.append(gradients(model))
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    for found, nbytes in two_ranks(mixed):
        close(found, expected, 1e-6)
        assert nbytes == sum(gradient.nbytes for gradient in expected.values())


# ---- in one process, as imports take long ----


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, alone):
    """All gradients go by way of DDP."""
    expected, buckets = whole_batch(), []
    ddp = DDP(adapt(net()))
    ddp.register_comm_hook(buckets, counting)
    torch.compiler.reset()
    for _ in range(2):
        ddp.zero_grad()
        loss_of(torch.compile(ddp, backend=backend), IDS, TARGETS).backward()
    torch.compiler.reset()
    close(gradients(ddp), expected)
    assert sum(buckets) == 2 * sum(gradient.nbytes for gradient in expected.values())


def test_nothing_is_sent_at_the_start_if_ddp_is_told_so(alone):
    with Sent() as sent:
        DDP(adapt(net()), init_sync=False)
    assert "broadcast" not in sent.counts


def test_a_model_whose_adapters_are_gone(alone):
    model = adapt(net())
    model.delete_adapter("default")
    model.model.head.requires_grad_(True)
    loss_of(DDP(model), IDS, TARGETS).backward()
    assert model.model.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["enabled", "accelerated", "the tuner alone"])
def test_of_a_peft_model_the_bases_are_not_sent(how, alone):
    """PEFT keeps them as buffers, and DDP would send those in every call."""
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft as integration

    config = peft.RandLoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    with integration.enable() if how != "accelerated" else contextlib.nullcontext():
        model = peft.get_peft_model(net(torch.float32), config)
    if how == "accelerated":
        model = integration.accelerate(model)
    if how == "the tuner alone":
        model = model.base_model
    assert len([*model.buffers()]) == 2
    numbers = sum(p.numel() for p in trained(model).values())
    with Sent() as start:
        ddp = DDP(model)
    loss_of(ddp, IDS, TARGETS).backward()
    assert sum(start.counts["broadcast"]) <= 4 * sum(p.numel() for p in model.parameters()) + 100
    with Sent() as second:
        loss_of(ddp, IDS, TARGETS).backward()
    with Sent() as third:
        loss_of(ddp, IDS, TARGETS).backward()
    assert sum(second.counts["broadcast"]) < 20  # the order of the buckets
    assert third.counts == {"all_reduce": [numbers]}
