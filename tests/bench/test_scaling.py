"""python -m bench scaling: what must hold of its numbers, whatever was measured; and what has been measured."""

import argparse
import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

import randlora  # noqa: E402
from bench import records, report, scaling, scaling_model, scaling_rates  # noqa: E402
from bench.scaling_engines import INFINIBAND, LINK_PART, NVLINK, Case, Group, Plan, memory, plans, step  # noqa: E402
from bench.scaling_model import DENSE, HADAMARD, LORA, METHODS, MODELS, PUBLISHED, Rows, describe  # noqa: E402

NAME = "Llama-3.2-3B"
DEPTH = MODELS[NAME].full.depth
MIB = 2**20


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert scaling.main(["--quick", "--gpu", "h100", "--results", str(folder), "--no-picture"]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(results):
    return records.read(results / "computed-h100" / "scaling.csv")


def of(rows, engine, method):
    return {int(row["gpus"]): row for row in rows if (row["engine"], row["method"]) == (engine, method)}


def trained_bytes(method):
    return DEPTH * sum(tensor.whole() for tensor in describe(NAME, 8192, 1024, 32).adapters[method].trained)


# ---- what must hold ----


@pytest.mark.parametrize("method", METHODS)
def test_fsdp_shards_all_but_what_every_rank_needs(rows, method):
    found = of(rows, "FSDP2", method)
    assert list(found) == [2, 8, 64, 512]
    sharded = [sum(float(row[f"{part}_MiB"]) for part in ("weights", "trained", "gradients", "adam"))
               for row in found.values()]  # fmt: skip
    assert sharded == sorted(sharded, reverse=True) and len(set(sharded)) == len(sharded)
    whole = [sum(float(row[f"{part}_MiB"]) for part in ("bases", "activations", "workspace")) for row in found.values()]
    assert len(set(whole)) == 1
    totals = [float(row["total_MiB"]) for row in found.values()]
    assert all(total > whole[0] for total in totals)
    assert totals[:3] == sorted(totals[:3], reverse=True)
    # More ranks than gamma has rows: what is gathered has as many rows as ranks, most of them padding.
    gathered = [float(row["buffers_MiB"]) for row in found.values()]
    assert gathered == sorted(gathered) and gathered[3] > 1.01 * gathered[0]


@pytest.mark.parametrize("method", METHODS)
def test_ddp_sends_the_gradients_of_what_is_trained_and_nothing_else(rows, method):
    for gpus, row in of(rows, "DDP", method).items():
        exact = 2 * (gpus - 1) / gpus * trained_bytes(method)
        assert step(Case(NAME), Plan("DDP", replicas=gpus), method, "h100").sent == exact
        assert float(row["sent_MiB"]) == pytest.approx(exact / MIB, abs=1e-3)


def test_hadamard_bases_are_signs(rows):
    sizes = {method: {row["bases_MiB"] for row in rows if row["method"] == method} for method in METHODS}
    assert sizes[LORA] == {"0"} and all(0 < float(size) < 0.01 for size in sizes[HADAMARD])
    assert all(float(size) > 20 for size in sizes[DENSE])  # with tensor parallelism rows of B are left out
    assert len(sizes[DENSE]) > 1


@pytest.fixture(scope="module")
def told():
    """By :func:`randlora.estimate`, of all blocks."""
    model = MODELS[NAME].build(device="meta")
    config = randlora.RandLoraConfig(r=32, target_modules="all-linear")
    inputs = {"input_ids": torch.zeros(8, 1024, dtype=torch.long)}
    result = randlora.estimate(model, config, 8192, kinds=[DENSE, HADAMARD], device="cuda", inputs=inputs)
    weights = sum(p.numel() for p in model.parameters()) * 2
    return {DENSE: result["methods"]["dense"], HADAMARD: result["methods"]["hadamard"],
            LORA: result["methods"]["lora"]}, weights  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_one_device_holds_what_estimate_tells(told, method):
    (values, weights), one = (told[0][method], told[1]), Plan("one device")
    if method == LORA:
        assert describe(NAME, 8192, 1024, 32).adapters[LORA].told["rank"] == values["rank"]
    found = memory(Case(NAME, checkpointing=False), one, method)
    assert found["weights"] == weights
    assert found["trained"] == found["gradients"] == 4 * values["trainable_parameters"]
    assert found["adam"] == values["optimizer_bytes"]
    assert (found["bases"], found["workspace"]) == (values["bases_bytes"], values["workspace_bytes"])
    model = describe(NAME, 8192, 1024, 32)
    frozen = DEPTH * model.kept_bytes + model.loss_bytes
    assert found["activations"] - frozen == values["saved_bytes"]
    work = model.adapters[method].work
    assert DEPTH * work.forward_multiply_adds == values["forward_multiply_adds"]
    assert DEPTH * (work.forward_multiply_adds + work.backward_multiply_adds) == values["multiply_adds"]
    assert memory(Case(NAME), one, method)["activations"] < found["activations"] / 2


def test_every_engine_has_a_place_for_every_gpu_and_computes_all_tokens():
    for name in PUBLISHED:
        depth = MODELS[name].full.depth
        for gpus in scaling.GPUS:
            found = plans(gpus, depth)
            assert all(plan.gpus == gpus and depth // plan.stages >= 3 for plan in found)
            assert len({plan.engine for plan in found}) == len(found)
    for sequences in (1, 3, 5, 8, 14):
        case = Case(NAME, 1024 * sequences)
        for plan in plans(16, DEPTH):
            assert case.tokens % case.call(plan).tokens == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_what_it_computes_at_least_and_no_engine_computes_less_than_one_device(rows, method):
    (one,) = of(rows, "one device", method).values()
    for row in rows:
        if row["method"] == method:
            assert float(row["computing_ms"]) <= float(row["step_ms"]) * (1 + 1e-4)
            assert float(row["computing_ms"]) >= float(one["computing_ms"]) * 0.99, row["engine"]


def test_tensor_parallel_ranks_have_their_part_of_the_linear_layers():
    whole, part = (describe(NAME, 8192, 1024, 32, tp) for tp in (1, 8))
    norms = [tensor for tensor in whole.block if tensor.row_bytes == 2]
    linear = sum(tensor.whole() for tensor in whole.block) - sum(tensor.whole() for tensor in norms)
    assert sum(tensor.whole() for tensor in part.block) == linear // 8 + sum(tensor.whole() for tensor in norms)
    assert part.block_work.forward_multiply_adds * 8 == whole.block_work.forward_multiply_adds
    assert whole.kept_bytes / 8 < part.kept_bytes < whole.kept_bytes / 2
    assert part.adapters[DENSE].trained == whole.adapters[DENSE].trained
    assert part.adapters[HADAMARD].work == whole.adapters[HADAMARD].work
    works = [model.adapters[DENSE].work.forward_multiply_adds for model in (whole, part)]
    assert works[0] / 8 <= works[1] < works[0] / 2
    d, hidden, P, keys = 3072, 8192, 3072, 1024
    rows = d // 8 * P + d * P + hidden // 8 * P + d * keys  # of q; o; gate, up and down; k and v
    columns = 32 * (d + d // 8 + d + keys // 8)
    assert part.adapters[DENSE].bases_bytes == 2 * (rows + columns)
    halves = [sum(tensor.whole() for tensor in model.adapters[LORA].trained) for model in (whole, part)]
    assert halves[0] / 8 < halves[1] < halves[0]
    with pytest.raises(ValueError, match="8 heads of keys"):
        describe(NAME, 8192, 1024, 32, 16)


def test_rows_are_what_is_sharded():
    assert [Rows(96, 10).sharded(ranks) for ranks in (1, 2, 64, 96, 512)] == [960, 480, 20, 10, 10]


def test_a_ring_is_as_fast_as_its_slowest_link():
    seconds = [Group(*sizes).seconds(1e12) for sizes in ((8, 8), (16, 8), (64, 1))]
    links = [NVLINK, 8 * INFINIBAND, INFINIBAND]
    assert seconds == pytest.approx([1e12 / (link * LINK_PART) for link in links], rel=1e-3)
    assert Group(1, 8).all_reduce(1e9) == (0, 0)


# ---- what has been measured ----


def measured(folder, **case):
    """Rows of a model.csv by provider."""
    rows = records.read(records.RESULTS / folder / "model.csv")
    return {row["provider"]: row for row in rows if all(row[key] == value for key, value in case.items())}


def test_activations_and_operations_are_those_of_an_h200():
    row = measured("nvidia-h200", **scaling_rates.LARGE)["frozen"]
    model = describe(NAME, 8192, 1024, 32)
    at_the_loss = model.loss_bytes // 3  # the log-probabilities; the gradients come after
    assert DEPTH * model.kept_bytes + at_the_loss == pytest.approx(int(row["saved_bytes"]), rel=0.005)
    work = [part.forward_multiply_adds + part.backward_multiply_adds for part in (model.block_work, model.ends_work)]
    assert DEPTH * work[0] + work[1] == pytest.approx(int(row["floor_multiply_adds"]), rel=1e-6)


@pytest.mark.parametrize("method", [DENSE, HADAMARD])
def test_one_device_takes_what_an_h200_took(method):
    row = measured("nvidia-h200", **scaling_rates.LARGE)[scaling_rates.PROVIDERS[method]]
    case, one = Case(NAME, checkpointing=False), Plan("one device")
    found = memory(case, one, method)
    assert sum(found.values()) - found["weights"] == pytest.approx(int(row["peak_bytes"]), rel=0.01)
    assert step(case, one, method, "h200").seconds == pytest.approx(float(row["median_ms"]) / 1e3, rel=0.01)


def test_a_number_is_measured_or_says_where_it_will_come_from():
    for gpu in scaling_rates.FOLDERS:
        numbers = {number.name: number for number in scaling_rates.of(gpu).numbers}
        assert {name for name, number in numbers.items() if number.measured} >= {"product", "copy", "memory"}
        assert not numbers["NVLINK"].measured and "nccl-tests" in numbers["LINK_PART"].source
        assert all(number.source for number in numbers.values())


def test_numbers_of_another_gpu_give_way_to_its_own(tmp_path, monkeypatch):
    """As soon as an H100's model.csv has the steps that the H200's has."""
    for name in scaling_rates.FOLDERS.values():
        (tmp_path / name).mkdir()
        for file in ("model.csv", "machine.json"):
            (tmp_path / name / file).write_text((records.RESULTS / name / file).read_text())
    path = tmp_path / scaling_rates.FOLDERS["h100"] / "model.csv"
    own = records.read(path)
    other = measured("nvidia-h200", **scaling_rates.LARGE).values()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, own[0], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*own, *other])
    before = {number.name: number.measured for number in scaling_rates.of("h100").numbers}
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    after = {number.name: number.measured for number in scaling_rates.of.__wrapped__("h100").numbers}
    assert not before["passes, dense"] and after["passes, dense"]


# ---- the command ----


def test_the_report_says_that_it_is_computed(results):
    text = report.write(results).read_text()
    section = text[text.index("### scaling:") :]
    assert "**Computed, not measured**, for NVIDIA H100" in section and "`python -m bench scaling --quick" in section
    assert "| FSDP2 | from 2 |" in section and "| NVLINK | 450 GB/s a direction and GPU | assumed |" in section
    names = [line.partition("](")[2].rstrip(")") for line in section.splitlines() if line.startswith("![")]
    assert len(names) == 3 and all((results / name).stat().st_size > 1000 for name in names)
    said = json.loads((results / "computed-h100" / "computed.json").read_text())
    assert "--results" not in said["command"] and said["memories_GiB"] == {"h100": 79, "h200": 139}


def test_a_quick_run_writes_nothing_by_itself(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "write", None)
    assert scaling.main(["--quick", "--gpu", "h200", "--gpus", "1,8"]) == 0
    out = capsys.readouterr().out
    assert "computed, not measured" in out and "FSDP2" in out
    assert "on how many of 1, 8 GPUs" in out


@pytest.mark.parametrize("text", ["0", "6", "8,x", "-2"])
def test_numbers_of_gpus_are_checked(text):
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        scaling._counts(text)


@pytest.mark.parametrize("option", ["--rank", "--sequence", "--tokens-per-gpu"])
def test_numbers_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--quick", option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_tokens_are_whole_sequences(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--tokens-per-gpu", "1000"])
    assert "multiple of --sequence" in capsys.readouterr().err
    with pytest.raises(ValueError, match="multiple of the sequence's 1024"):
        scaling_model.describe(NAME, 1000, 1024, 32)
