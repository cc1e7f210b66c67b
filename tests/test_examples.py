"""examples/finetune.py on a tiny random model: every method from the data to the reloaded adapter, and its errors."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import pages
from safetensors import safe_open
from safetensors.torch import load_file

import randlora

transformers = pytest.importorskip("transformers", reason="the examples need the extra [demo]")
pytest.importorskip("matplotlib", reason="the examples need the extra [demo]")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import adapters  # noqa: E402
import finetune  # noqa: E402
import text_data  # noqa: E402
import training  # noqa: E402

WORDS = ["red", "green", "blue", "dog", "cat", "bird", "runs", "sleeps", "eats"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a random BERT of two layers and a tokenizer that knows nine words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows():
    generator = random.Random(0)
    made = []
    for _ in range(90):
        words = [generator.choice(WORDS[:3]), *generator.choices(WORDS[3:], k=3)]
        generator.shuffle(words)
        made.append((" ".join(words), next(word for word in words if word in WORDS[:3])))
    return made


@pytest.fixture(scope="session")
def data(tmp_path_factory, rows):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def finetune_main(model, data, output, *arguments):
    return finetune.main(
        ["--model", model, "--data", data, "--output", str(output), "--max-length", "16", "--device", "cpu", *arguments]
    )


SHORT = ("--epochs", "2", "--batch-size", "16")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--method", "randlora", "--rank", "5", *SHORT), id="randlora"),
        pytest.param(("--kind", "sparse", "--dropout", "0.1", "--targets", "query", "value", *SHORT), id="sparse"),
        pytest.param(("--kind", "hadamard", *SHORT), id="hadamard"),
        pytest.param(("--kind", "very_sparse", "--targets", "output.dense", *SHORT), id="very_sparse"),
        pytest.param(("--method", "lora", "--rank", "2", *SHORT), id="lora"),
        pytest.param(("--method", "full", *SHORT), id="full"),
        pytest.param(("--method", "head"), id="head"),
    ],
)
def test_every_method_ends_with_table_plot_and_passed_checks(model, data, tmp_path, capsys, arguments):
    if "lora" in arguments:
        pytest.importorskip("peft")
    assert finetune_main(model, data, tmp_path, *arguments) == 0
    out = capsys.readouterr().out
    adapted = "head" not in arguments and "full" not in arguments
    assert out.count("the same classes as the trained model") == (2 if adapted else 1)
    assert "test accuracy" in out and "trainable parameters" in out
    assert (tmp_path / "training.png").exists() == ("head" not in arguments)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bytes"] == (tmp_path / "adapter" / adapters.WEIGHTS).stat().st_size
    assert result["trainable"] > 0 and 0 <= result["after"] <= 1


def test_same_seed_same_result(model, data, tmp_path):
    results = []
    for name in ("a", "b"):
        assert finetune_main(model, data, tmp_path / name, *SHORT, "--seed", "3", "--dropout", "0.2") == 0
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
        results[-1].pop("seconds")
    assert results[0] == results[1]
    a, b = (load_file(tmp_path / name / "adapter" / adapters.WEIGHTS) for name in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    "accelerate": (
        "accelerate.commands.launch", f"--config_file={EXAMPLES / 'accelerate/ddp.yaml'}", "--main_process_port=0",
    ),
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_result_of_one(model, data, tmp_path, launcher):
    """Also with a last batch of one row, which only one of them gets."""
    pytest.importorskip(LAUNCHERS[launcher][0].partition(".")[0])
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process has a mask of its own
    (folder / "config.json").write_text(json.dumps(config | without))
    rows = len(text_data.load_task(0, data).train)
    size = next(size for size in range(8, rows) if rows % size == 1)
    arguments = ["--epochs", "2", "--batch-size", str(size), "--rank", "5"]
    assert finetune_main(str(folder), data, tmp_path / "one", *arguments) == 0

    command = [sys.executable, "-m", *LAUNCHERS[launcher], EXAMPLES / "finetune.py", "--model", folder, "--data", data]
    command += ["--output", tmp_path / "two", "--max-length", "16", "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    for said in ("Task: ", "2 processes (cpu)", "epoch 2/2", "test accuracy", "adapter:", "plot:"):
        assert done.stdout.count(said) == 1, f"{said!r} of the first process alone:\n{done.stdout}"
    assert done.stdout.count("the same classes as the trained model") == 2 and (tmp_path / "two/training.png").exists()
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    one, two = (load_file(tmp_path / name / "adapter" / adapters.WEIGHTS) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_a_failed_check_is_said_and_gives_exit_status_one(model, data, tmp_path, capsys, monkeypatch):
    def broken(model):
        torch.nn.init.normal_(model.classifier.weight)
        return model

    monkeypatch.setattr(adapters, "merge", broken)
    assert finetune_main(model, data, tmp_path, *SHORT) == 1
    assert "merged:   FAILED" in capsys.readouterr().out


# ---- the adapter folder ----


@pytest.fixture(scope="module")
def adapter(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    assert finetune_main(model, data, output, *SHORT, "--kind", "sparse", "--rank", "5", "--seed", "7") == 0
    return output / "adapter"


def fresh(model):
    return training.load_pretrained(model, 3, 16, torch.device("cpu"))[0]


def test_names_and_settings_are_pefts(adapter):
    with safe_open(adapter / adapters.WEIGHTS, framework="pt") as file:
        keys = set(file.keys())
    layer = "base_model.model.encoder.encoder.layer.1.attention.self.query"
    assert {f"{layer}.randlora_lambda", f"{layer}.randlora_gamma", "base_model.model.classifier.weight"} <= keys
    assert not any("randlora_A" in key for key in keys)
    config = randlora.RandLoraConfig.from_pretrained(adapter)
    assert (config.r, config.projection_prng_key, config.kind) == (5, 7, "sparse")
    assert config.randlora_alpha > 0  # the number that "auto" came to
    assert len(config.target_modules) == 12 and config.modules_to_save == ["classifier"]


def test_other_bases_are_refused(model, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"projection_prng_key": 8}))
    with pytest.raises(text_data.UserError, match=r"projection_prng_key=8, but .* they do not belong together"):
        adapters.load(fresh(model), folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    adapters.load(fresh(model), folder)
    data = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(text_data.UserError, match=r"adapter_model\.safetensors is damaged"):
        adapters.load(fresh(model), folder)
    with pytest.raises(text_data.UserError, match=r"cannot read .*none/task\.json"):
        adapters.load(fresh(model), tmp_path / "none")


def test_the_block_of_the_readme_runs(adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").mkdir()
    shutil.copytree(adapter, tmp_path / "runs" / "finetune" / "adapter")
    monkeypatch.chdir(tmp_path / "examples")
    assert len(pages.run("examples/README.md", {})) == 1
    assert capsys.readouterr().out.strip() in WORDS[:3]


# ---- mistakes ----


def one_sentence(capsys):
    err = capsys.readouterr().err
    sentences = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "Traceback" not in err
    return sentences[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "no/such.csv"), r"data file not found: no/such.csv"),
        (("--text-column", "body"), r"there is no column 'body' \(it has: text, label\)"),
        (("--label-column", "topic"), r"there is no column 'topic'"),
        (("--targets", "query", "q_proj"), r"target 'q_proj' matches no linear layer .* are: dense, key, query, value"),
        (("--model", "/no/such/folder"), r"cannot load the model '/no/such/folder'"),
        (("--max-length", "64"), r"--max-length 64 is more than the 32 tokens"),
        (("--method", "lora", "--kind", "sparse"), r"--kind has no meaning for --method lora"),
        (("--lr", "-1"), r"--lr -1.0 is out of range"),
        (("--device", "nonsense"), r"cannot use the device 'nonsense'"),
    ],
)
def test_mistakes_give_one_sentence(model, data, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert finetune_main(model, data, tmp_path, *arguments) == 2
    assert re.search(message, one_sentence(capsys))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "error in process 3: --device cuda:1 would be that of all 4 processes: say cuda"),
        ("cuda", "error in process 3: process 3 of this machine has no GPU of its own: there are 2"),
    ],
)
def test_each_process_wants_a_gpu_of_its_own(model, data, tmp_path, capsys, monkeypatch, device, message):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert finetune_main(model, data, tmp_path, "--device", device) == 2
    assert message in capsys.readouterr().err.splitlines()


def test_unknown_label_in_the_test_data(model, data, tmp_path, capsys):
    test = write_jsonl(tmp_path / "test.jsonl", [("red dog", "red"), ("pink dog", "pink")])
    assert finetune_main(model, data, tmp_path, "--test-data", test) == 2
    assert one_sentence(capsys) == "error: test.jsonl: unknown label 'pink' (the training data has: blue, green, red)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "expected a .csv or .jsonl file"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{oops\n', "a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl, line 1: not a JSON object"),
        ("a.csv", "text,label\n,\n", "no row with both a text and a label"),
        ("a.csv", "text,label\na,x\nb,x\n", "there is one label only"),
        ("a.csv", "text,label\na,x\nb,x\nc,x\nd,y\n", "label 'y' has 1 example"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(text_data.UserError, match=message):
        text_data.load_task(0, str(path))


def test_no_traceback_from_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune.py", "--data", "missing.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: data file not found: missing.csv"


# ---- data ----


def test_csv_and_json_lines_give_the_same_task(tmp_path, rows, data):
    path = tmp_path / "data.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([("topic", "body"), *((label, text) for text, label in rows)])
    table = text_data.load_task(1, str(path), text_column="body", label_column="topic")
    lines = text_data.load_task(1, data)
    assert (table.train, table.test, table.names) == (lines.train, lines.test, lines.names)


def test_the_docstring_task():
    task = text_data.load_task(0)
    assert len(task.names) == 20 and not {"test", "idlelib", "site-packages"} & set(task.names)
    parts = task.train, task.validation, task.test
    total = sum(map(len, parts))
    assert total > 1500
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert abs(len(part) / total - share) < 0.02
        assert set(part.labels) == set(range(20))
    texts = [text for part in parts for text in part.texts]
    assert len(set(texts)) == total, "a text that is in two parts would be known before it is tested"
    assert text_data.load_task(0) == task and text_data.load_task(1).test != task.test
    assert 0.05 <= task.majority < 0.5
