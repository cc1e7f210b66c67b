"""The model card beside an adapter: its front matter, how it says to load the adapter, and uploading both."""

import inspect
import shutil
import sys
import types

import pytest
import torch
from helpers.checkpoints import CARD, CONFIG, WEIGHTS, assert_same_numbers, load
from helpers.models import IDS, adapt, add, net, tiny_bert, tiny_llama

hub = pytest.importorskip("huggingface_hub")


def named(model, name="some-user/a.model"):
    """As if it came from the Hub."""
    model.name_or_path = model.config._name_or_path = name
    return model


def data_of(folder):
    return hub.ModelCard.load(folder / CARD).data.to_dict()


def code_of(folder):
    return (folder / CARD).read_text().split("```python\n")[1].split("```")[0]


# ---- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, ids", [(tiny_llama, IDS), (tiny_bert, IDS)])
@pytest.mark.parametrize("names", [["default"], ["default", "b"], ["b", "c"]])
def test_the_snippet_works_in_the_folder(tmp_path, monkeypatch, make, ids, names):
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "up_proj"] if make is tiny_llama else ["query", "dense"]}
    model = adapt(base, names[0], **targets)
    for i, name in enumerate(names[1:]):
        add(model, name, 5 + i, **targets, save_projection=False)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    found = {}
    exec(code_of(tmp_path / "adapter"), found)
    for name in names:
        model.set_adapter(name)
        found["model"].set_adapter(name)
        with torch.no_grad():
            assert torch.equal(found["model"](ids).logits, model.eval()(ids).logits)
    data = data_of(tmp_path / "adapter")
    assert "base_model" not in data, "a folder of this machine"
    assert data["library_name"] == ("randlora" if len(names) > 1 else "peft")  # if PEFT reads all of them


def test_the_line_for_peft_works(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapt(type(tiny_llama()).from_pretrained(tmp_path / "base")).eval()
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    text = (tmp_path / "adapter" / CARD).read_text()
    line = text.split("PEFT reads it too: `")[1].split("`")[0]
    found = {"peft": peft}
    exec(code_of(tmp_path / "adapter"), found)
    found["base"] = found["model"].unload()
    theirs = eval(line, found).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_front_matter_is_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    model = named(tiny_llama())
    model.add_model_tags(["one: odd 'tag'", "yes"])
    theirs = peft.get_peft_model(model, peft.RandLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "peft")
    model = named(tiny_llama())
    model.add_model_tags(["one: odd 'tag'", "yes"])
    adapt(model).save_pretrained(tmp_path / "ours")
    ours, theirs = data_of(tmp_path / "ours"), data_of(tmp_path / "peft")
    assert set(ours.pop("tags")) == {*theirs.pop("tags"), "randlora"} and ours == theirs
    assert ours["base_model"] == "some-user/a.model" and ours["library_name"] == "peft"


def test_what_peft_would_misread_is_not_called_pefts(tmp_path):
    adapt(named(tiny_llama()), num_bases=2).save_pretrained(tmp_path)
    assert data_of(tmp_path)["library_name"] == "randlora" and "PEFT reads" not in (tmp_path / CARD).read_text()
    adapt(net()).save_pretrained(tmp_path / "net")
    assert data_of(tmp_path / "net") == {"library_name": "peft", "tags": ["randlora"]}
    assert "base = ...  # the Net that was adapted" in code_of(tmp_path / "net")


def test_a_card_of_the_users_keeps_its_text(tmp_path):
    (tmp_path / CARD).write_text("---\nlicense: mit\nlibrary_name: x\ntags:\n- mine\n---\n# My model\n\nIt is good.\n")
    model = adapt(named(tiny_llama()))
    model.save_pretrained(tmp_path)
    data, text = data_of(tmp_path), (tmp_path / CARD).read_text()
    assert data["license"] == "mit" and data["library_name"] == "peft" and "mine" in data["tags"]
    assert data["base_model"] == "some-user/a.model" and "# My model\n\nIt is good.\n\n## How to load it" in text
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == text
    model.create_or_update_model_card(tmp_path, "me/mine", tags=["new"])
    assert 'from_pretrained(base, "me/mine")' in code_of(tmp_path) and "new" in data_of(tmp_path)["tags"]
    assert (tmp_path / CARD).read_text().count("How to load it") == 1 and "It is good." in (tmp_path / CARD).read_text()


def test_a_card_follows_what_is_in_its_folder(tmp_path):
    """Trainers write theirs before there is an adapter; later another one comes, which PEFT cannot read."""
    model = adapt(named(tiny_llama()))
    (tmp_path / CARD).write_text("# Mine\n")
    model.create_or_update_model_card(tmp_path)
    assert data_of(tmp_path)["library_name"] == "randlora" and "PEFT reads" not in (tmp_path / CARD).read_text()
    model.save_pretrained(tmp_path)
    assert data_of(tmp_path)["library_name"] == "peft" and "PEFT reads" in (tmp_path / CARD).read_text()
    add(model, "second", 5, num_bases=1)
    model.save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text()
    assert data_of(tmp_path)["library_name"] == "randlora" and "PEFT reads" not in text
    assert text.startswith("---") and text.count("How to load it") == text.count("# Mine") == 1


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    (tmp_path / CARD).write_text("---\n[: ]{\n---\nmine")
    model = adapt(net())
    with pytest.warns(UserWarning, match="README.md is left as it is"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "---\n[: ]{\n---\nmine"
    assert_same_numbers(load(tmp_path), model)


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    adapt(net()).save_pretrained(tmp_path)
    assert "How to load it" in (tmp_path / CARD).read_text()
    (tmp_path / CARD).write_text("mine")
    adapt(net()).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


# ---- uploading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """What reaches the Hub; ``readme``, if it is set, is there before."""
    told = types.SimpleNamespace(calls=[], readme=None, folder=tmp_path / "uploaded")

    class Api:
        def __init__(self, token=None):
            told.calls.append(("token", token))

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            told.calls.append(("create", repo_id, private))
            return hub.RepoUrl(f"https://huggingface.co/me/{repo_id.rpartition('/')[2]}")

        def create_branch(self, repo_id, *, branch, exist_ok=False):
            assert exist_ok
            told.calls.append(("branch", repo_id, branch))

        def file_exists(self, repo_id, filename, *, revision=None):
            return told.readme is not None

        def hf_hub_download(self, repo_id, filename, *, revision=None):
            (tmp_path / "downloaded").write_text(told.readme)
            return tmp_path / "downloaded"

        def upload_folder(self, *, folder_path, **options):
            told.calls.append(("upload", options))
            shutil.copytree(folder_path, told.folder)
            return "done"

    def as_the_real_one_takes_it(real, replaced):
        def call(self, *args, **kwargs):
            inspect.signature(real).bind(self, *args, **kwargs)
            return replaced(self, *args, **kwargs)

        return call

    for name in ("create_repo", "create_branch", "file_exists", "hf_hub_download", "upload_folder"):
        setattr(Api, name, as_the_real_one_takes_it(getattr(hub.HfApi, name), getattr(Api, name)))
    monkeypatch.setattr(hub, "HfApi", Api)
    return told


def options_of(uploads):
    ((_, options),) = [call for call in uploads.calls if call[0] == "upload"]
    return options


def test_push_to_hub(uploads):
    model = add(adapt(named(tiny_llama())), "b", 4)
    assert model.push_to_hub("mine", True, "t", commit_message="m", revision="dev", tags=["x"]) == "done"
    assert uploads.calls[:3] == [("token", "t"), ("create", "mine", True), ("branch", "me/mine", "dev")]
    assert options_of(uploads) == {
        "repo_id": "me/mine", "commit_message": "m", "commit_description": None, "revision": "dev", "create_pr": False,
    }  # fmt: skip
    assert {p.name for p in uploads.folder.iterdir()} == {CONFIG, WEIGHTS, CARD, "b"}
    data = data_of(uploads.folder)
    assert data["base_model"] == "some-user/a.model" and "x" in data["tags"]
    code = code_of(uploads.folder)
    assert 'snapshot_download("me/mine")' in code and 'load_adapter(folder + "/b", "b")' in code
    assert_same_numbers(load(uploads.folder, tiny_llama()), model)
    with pytest.raises(TypeError, match="push_to_hub\\(\\) does not know branch"):
        model.push_to_hub("mine", branch="dev")


def test_the_card_of_the_repository_stays(uploads, tmp_path):
    uploads.readme = "---\nlicense: mit\n---\nwritten on the Hub\n"
    adapt(net()).push_to_hub("mine")
    text = (uploads.folder / CARD).read_text()
    assert "written on the Hub" in text and "license: mit" in text and 'from_pretrained(base, "me/mine")' in text


def test_saving_and_uploading_at_once(uploads, tmp_path):
    """As transformers' save_pretrained; other files of the folder stay here."""
    model = add(adapt(net()), "b", 4)
    state = add(adapt(net(), seed=8), "b", 9).state_dict()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "private.txt").write_text("")
    model.save_pretrained(tmp_path / "mine", ["default"], state_dict=state, push_to_hub=True, token="t", private=True)
    assert uploads.calls[:2] == [("token", "t"), ("create", "mine", True)]
    assert {p.name for p in uploads.folder.iterdir()} == {CONFIG, WEIGHTS, CARD}
    assert (uploads.folder / WEIGHTS).read_bytes() == (tmp_path / "mine" / WEIGHTS).read_bytes()
    assert '"me/mine"' in code_of(uploads.folder) and '"."' in code_of(tmp_path / "mine")
    model.save_pretrained(tmp_path / "other", push_to_hub=True, is_main_process=False)
    assert len(uploads.calls) == 3 and not (tmp_path / "other").exists()
