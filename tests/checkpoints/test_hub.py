"""checkpoints/hub.py: what is asked of the hub and what is not, in bounded time; what is pushed loads again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from latent_verse import AugVAE, LVerse, load_augvae
from latent_verse.checkpoints import hub
from latent_verse.checkpoints.biart import load_pretrained
from latent_verse.checkpoints.ckpt_files import CheckpointError
from tests.messages import naming
from tests.tiny_lverse import make_lverse

LOADERS = [load_augvae, LVerse.from_pretrained, load_pretrained]
each_loader = pytest.mark.parametrize("load", LOADERS, ids=["load_augvae", "LVerse", "load_pretrained"])


def said(load, path, *facts) -> str:
    """The one line, which names all of `facts`, that loading `path` fails with."""
    with pytest.raises(CheckpointError, match=naming(*facts)) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ fetching


@pytest.fixture
def no_hub(monkeypatch):
    """Fails the test if anything asks the hub."""
    for name in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, lambda *a, **k: pytest.fail("asked the hub"))


@each_loader
def test_a_mistyped_path_is_never_asked_for(load, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    Path("results/shapes/bundle").mkdir(parents=True)
    for path, near in (
        ("results/shaps/bundle", "results/shapes/bundle"),
        ("results/shaps/bundel", "results/shapes"),
        ("results/shaps", "results/shapes"),
        ("result", "results"),
        ("./result", "results"),
        ("results\\shapes\\bundle", "results/shapes/bundle"),
        (str(tmp_path / "results" / "shape"), str(tmp_path / "results" / "shapes")),
    ):
        said(load, path, path, "exist", f"Did you mean {near}?")
    for path in ("./x", "../x", "/x/y", "a/b/c", "nothing-like-it"):
        said(load, path, path, "exist")
    Path("mine").mkdir()
    assert "mine is a folder" in said(load, "mine/qqqqqq", "mine/qqqqqq", "exist", "owner/name")
    shutil.rmtree("results")
    said(load, "results/tiny_augvae_sl", "results/tiny_augvae_sl", "exist")  # before the first run


@each_loader
def test_a_checkpoint_that_is_absent_is_never_asked_for(load, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    for path in ("model.ckpt", "owner/model.ckpt", "owner/model.safetensors"):
        said(load, path, path, "exist")


@each_loader
def test_what_may_be_an_id_is_told_of_both(load, tmp_path, monkeypatch):
    def absent(self, name, timeout):
        response = SimpleNamespace(headers={}, status_code=404, request=SimpleNamespace(method="GET", url=name))
        raise RepositoryNotFoundError("404 Client Error. (Request ID: 1)\nmore", response=response)

    def unreachable(self, name, timeout):
        raise ConnectionError("no route to host\nwith a second line")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for model_info, why in ((absent, "none of that name"), (unreachable, "no route to host")):
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_cached)
        said(load, "someone/model", "someone/model", "neither", "folder", "hub id", why)


def nothing_cached(name, allow_patterns, local_files_only=False):
    assert local_files_only, "the hub does not answer, and is asked again"
    raise huggingface_hub.errors.LocalEntryNotFoundError("not there")


@pytest.mark.parametrize("fails", [ConnectionError, huggingface_hub.errors.HfHubHTTPError])
def test_without_the_hub_an_earlier_copy_is_taken(fails, tiny_augvae, tmp_path, monkeypatch):
    """It is out of reach, or answers with an error."""
    model = make_lverse(tiny_augvae(single_level=4))
    model.save_pretrained(tmp_path / "copy")

    def unreachable(self, name, timeout):
        response = SimpleNamespace(headers={}, status_code=503, request=SimpleNamespace(method="GET", url=name))
        raise fails("503", **({"response": response} if fails is not ConnectionError else {}))

    def cached(name, allow_patterns, local_files_only=False):
        assert local_files_only
        return str(tmp_path / "copy")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert LVerse.from_pretrained("someone/model", device="cpu").fingerprints == model.fingerprints


def test_a_hub_that_never_answers_is_not_waited_for(tmp_path):
    """It takes the connection and says nothing: the libraries alone would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = (
            "from latent_verse.checkpoints import hub\nhub.ANSWERS_WITHIN = 0.5\n"
            "try:\n    hub.fetch_from_hub('someone/model', ['config.json'], 'a bundle')\n"
            "except hub.CheckpointError as error:\n    print(error)\n"
        )
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        ended = subprocess.run(
            [sys.executable, "-c", code], env=place, cwd=hub.__file__.rpartition("/latent_verse/")[0],
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert naming("someone/model", "hub").search(ended.stdout), ended


# ------------------------------------------------------------------------------------------------------------- pushing


class Hub:
    """In place of `huggingface_hub.HfApi`: repositories are folders below `root`."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []

    def __call__(self, **options) -> Hub:
        self.calls.append(options)
        return self

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        self.calls.append({"private": private})
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def file_exists(self, repo_id, filename):
        return (self.root / repo_id / filename).is_file()

    def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
        self.calls.append({"message": commit_message})
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        url = f"https://hub/{repo_id}/commit/1"
        return SimpleNamespace(commit_url=url, pr_url=f"https://hub/{repo_id}/discussions/1" if create_pr else None)


@pytest.fixture
def local_hub(tmp_path, monkeypatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def models(tiny_augvae) -> list[AugVAE | LVerse]:
    return [tiny_augvae(single_level=4), make_lverse(tiny_augvae(single_level=4))]


def test_what_is_pushed_loads_again(tiny_augvae, local_hub, tiny_images):
    vae, model = models(tiny_augvae)
    assert vae.push_to_hub("me/vae") == "https://hub/me/vae/commit/1"
    assert model.push_to_hub("shapes", "First", private=True, token="hf_other", create_pr=True).endswith(
        "discussions/1"
    )
    assert {"private": True} in local_hub.calls and {"message": "First"} in local_hub.calls
    assert [call["token"] for call in local_hub.calls if "token" in call] == [None, "hf_other"]
    assert torch.equal(AugVAE.from_pretrained(local_hub.root / "me/vae").codes(tiny_images()), vae.codes(tiny_images()))
    again = LVerse.from_pretrained(local_hub.root / "me/shapes", device="cpu")
    assert again.fingerprints == model.fingerprints
    for name, library in (("vae", "AugVAE"), ("shapes", "LVerse")):
        card = huggingface_hub.ModelCard.load(local_hub.root / "me" / name / "README.md")
        assert card.data.library_name == "latent-verse" and f'{library}.from_pretrained("me/{name}")' in card.text
        assert "AugVAE: " in card.text and ("BiART: " in card.text) == (library == "LVerse")
        compile(card.text.split("```python\n")[1].split("```")[0], name, "exec")


def test_pushing_again_leaves_the_model_card_alone(tiny_augvae, local_hub):
    for model in models(tiny_augvae):
        model.push_to_hub("me/model")
        (local_hub.root / "me/model/README.md").write_text("mine")
        model.push_to_hub("me/model")
        assert (local_hub.root / "me/model/README.md").read_text() == "mine"
        shutil.rmtree(local_hub.root)


def test_pushing_fails_in_one_line(tiny_augvae, local_hub, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("403 Forbidden: no rights\nmore of it")

    for model in models(tiny_augvae):
        for name in ("a b", "a/b/c", "", "-a", None, 5):
            said(model.push_to_hub, name, "repo_id", repr(name), "owner/name")
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub, "get_token", lambda: None)
            said(model.push_to_hub, "me/model", "me/model", "token", "hf auth login")
        with monkeypatch.context() as patch:
            patch.setattr(local_hub, "create_repo", refused)
            assert "more of it" not in said(model.push_to_hub, "me/model", "me/model", "403 Forbidden: no rights")
    assert not local_hub.root.exists()


def test_what_cannot_be_saved_makes_nothing_on_the_hub(tiny_augvae, local_hub):
    for model, network in zip(models(tiny_augvae), ("self", "biart"), strict=True):
        with torch.no_grad():
            next(getattr(model, network, model).parameters()).fill_(torch.nan)
        said(model.push_to_hub, "me/model", "finite")
    assert not local_hub.root.exists()
