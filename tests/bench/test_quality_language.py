"""The task "language": its text, its pretrained model, and what the comparison asks of it, at tiny sizes."""

import functools
import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("matplotlib", "tqdm", "tokenizers", "transformers", "safetensors"):
    pytest.importorskip(package)

from bench.quality.tasks import corpus, language, pretrain  # noqa: E402

LICENCE = "# Copyright somebody.\n# All rights reserved.\n\n"
C_LICENCE = "/* Licensed\n * as it is. */\n// and more\n\n"


def text(seed, words):
    """Lines of those words: a language that a model can learn."""
    rng = random.Random(seed)
    return "".join(f"{' '.join(rng.choice(words) for _ in range(6))}\n" for _ in range(400))


@pytest.fixture(scope="module")
def small():
    """A corpus of two languages."""
    python, cpp = ["def", "self", "return", "x = y"], ["template", "int main", "public:", "x->y"]
    texts = {
        "pretraining": [text(seed, python) for seed in range(4)],
        "kept": [text(5, python)],
        "train": [text(seed, cpp) for seed in range(6, 8)],
        "validation": [text(8, cpp)],
        "test": [text(9, cpp)],
    }
    return corpus.encoded(texts)


def test_text_is_cleaned_and_nothing_is_in_two_parts(tmp_path):
    body = "".join(f"the line {i} of this file\n" for i in range(40))
    assert corpus.without_licence(LICENCE + body, ".py") == body
    assert corpus.without_licence("# What it does.\n\n" + body, ".py") == "# What it does.\n\n" + body
    assert corpus.without_licence(C_LICENCE + body, ".h") == body
    assert corpus.without_licence("#pragma once\n" + C_LICENCE, ".h").startswith("#pragma once")

    copied = LICENCE + body.replace("line 3 ", "LINE 3 ")
    other = body.replace("line", "row")
    files = {"a.py": LICENCE + body, "b.py": copied, "c.py": other, "d.py": "# @generated\n" + other, "e.py": "x = 1\n"}
    for name, written in files.items():
        (tmp_path / name).write_text(written)
    (tmp_path / "f.py").write_bytes(b"\xff\xfe" * 400)
    found = list(corpus.fresh(corpus.cleaned(sorted(tmp_path.iterdir()), ".py"), set()))
    assert found == [body, other]

    for folder in ("test", "ATen/ops"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "g.py").write_text(body)
        (tmp_path / folder / "g.h").write_text(body)
    assert {path.name for path in corpus.python_files(tmp_path)} == {*files, "f.py", "g.py"}
    assert [path.parent.name for path in corpus.headers(tmp_path)] == ["test"]
    assert corpus._until(iter(["aa", "bb", "cc"]), 3) == ["aa", "bb"]


def test_ids_are_the_text_and_travel(small, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(small.tokenizer)
    assert tokenizer.token_to_id(corpus.END) == 0 == small.ids["test"][-1]
    assert tokenizer.decode(list(small.ids["test"][:-1])) == text(9, ["template", "int main", "public:", "x->y"])
    assert int(max(ids.max() for ids in small.ids.values())) < corpus.VOCABULARY

    small.write(tmp_path / corpus.NAME)
    read = corpus.corpus(cache=tmp_path)
    assert read.fingerprint == small.fingerprint and list(tmp_path.iterdir()) == [tmp_path / corpus.NAME]
    part = corpus.corpus(quick=True, cache=tmp_path)
    assert part.ids["train"].size == small.ids["train"].size // corpus.QUICK_DIVISOR
    np.testing.assert_array_equal(part.ids["test"], small.ids["test"])
    changed = dict(small.ids, test=small.ids["test"][::-1])
    assert len({small.fingerprint, part.fingerprint, corpus.Corpus(changed, small.tokenizer).fingerprint}) == 3


def test_this_machine_has_a_corpus(monkeypatch):
    found = corpus.build(divisor=200)
    assert all(found.ids[split].size > 100 for split in corpus.SPLITS)
    monkeypatch.setattr(corpus, "headers", lambda folder: iter([]))
    with pytest.raises(FileNotFoundError, match="no text for train, validation, test"):
        corpus.build(divisor=200)


RECIPE = pretrain.Recipe(width=64, layers=1, steps=30, batch=4, rate=1e-2, vocabulary=512)


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return language.Language(small, RECIPE, folder, steps=10, held_out_windows=4), folder


def test_a_pretrained_model_knows_its_own_language_and_learns_another(made):
    task, _ = made
    torch.manual_seed(0)
    model = task.model("cpu")
    fresh = pretrain.new_model(RECIPE)
    assert task.kept(model) < 0.2 * task.kept(fresh) and task.kept(model) < 0.5 * task.score(model, "validation")
    assert math.log(task.score(model, "validation")) == pytest.approx(task.validation_loss(model))

    before, kept = task.score(model, "test"), task.kept(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = list(task.batches(0))
    assert len(batches) == task.steps and batches[0].shape == (language.BATCH, pretrain.CONTEXT)
    for batch in batches:
        task.loss(model.train(), batch[:4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.score(model, "test") < 0.5 * before and task.kept(model) > kept and model.training

    again = task.model("cpu")  # as it was: nobody's training is left in it
    assert task.score(again, "test") == before
    assert again.lm_head.weight is again.model.embed_tokens.weight
    same, other = next(task.batches(0)), next(task.batches(1))
    assert torch.equal(same, batches[0]) and not torch.equal(same, other)


def test_weights_are_made_once(made, monkeypatch):
    task, folder = made
    weights = pretrain.pretrained(RECIPE, "cpu", task.corpus, folder)
    assert (folder / f"{RECIPE.name}.csv").read_text().startswith("step,seconds,loss\n30,")
    assert not list(folder.glob("*.part"))
    monkeypatch.setattr(pretrain, "_train", lambda *arguments: pytest.fail("made again"))
    again = pretrain.pretrained(RECIPE, "cpu", task.corpus, folder)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    other = pretrain.Recipe(**{**RECIPE.__dict__, "steps": 41})  # its weights are not taken for those of another recipe
    assert other.fingerprint(task.corpus) != RECIPE.fingerprint(task.corpus)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        pretrain.pretrained(other, "cpu", task.corpus, folder)


def test_pretraining_that_diverges_says_so(small, tmp_path):
    recipe = pretrain.Recipe(width=64, layers=1, steps=3, batch=1, rate=math.inf, vocabulary=512)
    with pytest.raises(FloatingPointError, match="diverged"):
        pretrain.pretrained(recipe, "cpu", small, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_pretraining_in_bfloat16_comes_to_the_same(small, monkeypatch):
    """On a CPU where products are asked for in it; compiled, but for the C++, which takes long to compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    _, ((_, _, exactly),) = pretrain._train(RECIPE, "cpu", small)
    torch.set_float32_matmul_precision("medium")
    try:
        weights, ((_, _, loss),) = pretrain._train(RECIPE, "cpu", small)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert loss == pytest.approx(exactly, rel=0.02) and loss != exactly
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_the_rate_and_the_widths():
    factors = [pretrain.cosine(step, 100) for step in range(100)]
    assert factors[0] < factors[3] < 1 and max(factors) == pytest.approx(1, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(factors[5:])) and factors[-1] == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="width must be one of 128, 256, 512, 1024, got 100"):
        language.make(width=100)
