"""checkpoints/: folders of bundles and saved AugVAEs. Changed settings are found; what was there is not lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from latent_verse.checkpoints import augvae, model_folders
from latent_verse.checkpoints import bundle as of_bundle
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.bundle import load_bundle
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.config import UserError
from latent_verse.files import FileError, writing
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.tiny_lverse import make_lverse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_augvae) -> LVerse:
    return make_lverse(tiny_augvae(single_level=4))


@pytest.fixture
def bundle(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def edited(file: Path, change: Callable[[dict], object]) -> Path:
    """Write a JSON file again after a change."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def unrecorded(bundle: Path) -> None:
    """Make a bundle one of an earlier version, which recorded no fingerprint of settings."""
    for name in ("config.json", "vae/config.json"):
        edited(bundle / name, lambda content: content.pop("settings_fingerprint"))


# ------------------------------------------------------------------------------------------------------------- settings

# that the weights do not say
CHANGED = {
    "n_head": ("config.json", lambda c: c["biart"].update(n_head=1)),
    "reference_dropout": ("config.json", lambda c: c["info"].update(reference_dropout=0)),
    "more information": ("config.json", lambda c: c["info"].update(text_too_long="error")),
    "less information": ("config.json", lambda c: c.update(info={})),
    "the AugVAE's norm there": ("config.json", lambda c: c["vae"].update(norm="pixel")),
    "norm": ("vae/config.json", lambda c: c["config"].update(norm="pixel")),
    "resolution": (
        "vae/config.json",
        lambda c: c["config"].update(resolution=32, attn_resolutions=[16, 8, 4], single_level=8),
    ),
    "a weight of the loss": ("vae/config.json", lambda c: c["config"].update(quant_beta=0.5)),
    "another fingerprint": ("config.json", lambda c: c.update(settings_fingerprint="0" * 16)),
    "a fingerprint of another kind": ("config.json", lambda c: c.update(settings_fingerprint=[None])),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_settings_are_found(bundle, case):
    name, change = CHANGED[case]
    edited(bundle / name, change)
    with pytest.raises(CheckpointError, match=naming(bundle)) as error:
        LVerse.from_pretrained(bundle, "cpu")
    assert "\n" not in str(error.value)
    if name != "config.json":
        with pytest.raises(CheckpointError, match=naming(bundle / name, "settings_fingerprint")):
            load_augvae(bundle / "vae")


@pytest.mark.parametrize("case", ["the AugVAE's norm there", "norm", "a weight of the loss"])
def test_without_a_record_the_two_files_must_say_the_same(bundle, case):
    unrecorded(bundle)
    name, change = CHANGED[case]
    edited(bundle / name, change)
    with pytest.raises(CheckpointError, match=naming(bundle, "config.json", "vae/config.json")) as error:
        load_bundle(bundle)
    assert naming("quant_beta", 0.25, 0.5).search(str(error.value)) or naming("norm", "group").search(str(error.value))


def test_files_of_earlier_versions_are_read(bundle):
    unrecorded(bundle)
    LVerse.from_pretrained(bundle, "cpu")
    for name, part in (("config.json", "biart"), ("config.json", "vae"), ("vae/config.json", "config")):
        for newer in ("pos_by_modality", "norm"):  # as if these were settings of this version
            edited(bundle / name, lambda content, part=part, newer=newer: content[part].pop(newer, None))
    LVerse.from_pretrained(bundle, "cpu")


def test_a_setting_that_a_later_version_adds_changes_nothing(bundle):
    """What is in the file counts, not what a version makes of it."""
    for name in ("config.json", "vae/config.json"):
        content = json.loads((bundle / name).read_text())
        for part in ("vae", "config"):
            if part in content:
                del content[part]["norm"]  # as written by a version without it
        settings = (augvae if name.startswith("vae") else of_bundle).SETTINGS
        model_folders.write_about(bundle / name, content, settings)
    LVerse.from_pretrained(bundle, "cpu")


def test_another_program_may_write_the_json_again(bundle):
    """Order, space and the form of numbers are not settings."""

    def other(value):
        if isinstance(value, dict):
            return {key: other(value[key]) for key in reversed(value)}
        if isinstance(value, list):
            return [other(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    for name in ("config.json", "vae/config.json"):
        (bundle / name).write_text(json.dumps(other(json.loads((bundle / name).read_text())), indent=8))
    assert LVerse.from_pretrained(bundle, "cpu").info == {"reference_dropout": 0.1}


def test_settings_that_are_nested_deeply(bundle):
    deep: list = []
    for _ in range(900):
        deep = [deep]
    edited(bundle / "config.json", lambda content: content["info"].update(deep=deep))
    with pytest.raises(CheckpointError, match=naming(bundle / "config.json")):
        load_bundle(bundle)


def test_what_is_saved_again_has_a_record(model, bundle, tmp_path):
    unrecorded(bundle)
    LVerse.from_pretrained(bundle, "cpu").save_pretrained(tmp_path / "again")
    for name in ("config.json", "vae/config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["settings_fingerprint"]


def test_a_resolution_beyond_the_memory_is_refused_before_an_image_is_read(tiny_augvae, tmp_path, monkeypatch):
    tiny_augvae().save_pretrained(tmp_path)

    def enlarge(content):
        content["config"].update(resolution=8192, attn_resolutions=[4096, 2048, 1024])
        del content["settings_fingerprint"]

    edited(tmp_path / "config.json", enlarge)
    monkeypatch.setattr("latent_verse.nn.memory.machine_bytes", lambda: 16 * 2**30)
    with pytest.raises(CheckpointError, match=naming(tmp_path / "config.json", "resolution", "GiB", 16)) as error:
        load_augvae(tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ tokenizer


def swapped(vocabulary: dict) -> None:
    *_, a, b = vocabulary
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


TOKENIZERS = {
    "ids": lambda c: swapped(c["model"]["vocab"]),
    "merges": lambda c: c["model"].update(merges=c["model"]["merges"][1:]),
    "the order of merges": lambda c: c["model"]["merges"].reverse(),
    "case": lambda c: c["normalizer"]["normalizers"].pop(0),
    "spaces": lambda c: c["pre_tokenizer"].update(add_prefix_space=False),
    "the decoder": lambda c: c.update(decoder=None),
    "a token more": lambda c: c["model"]["vocab"].update(more=len(c["model"]["vocab"])),
    "a special token": lambda c: c.update(added_tokens=[]) or c["model"].update(unk_token="a"),
    "dropout": lambda c: c["model"].update(dropout=0.5),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_changed_tokenizer_is_found(bundle, case):
    edited(bundle / "tokenizer" / "tokenizer.json", TOKENIZERS[case])
    with pytest.raises(CheckpointError, match=naming(bundle, "tokenizer")) as error:
        LVerse.from_pretrained(bundle, "cpu")
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_found(tiny_augvae, bundle, tmp_path):
    """Whole in itself, with the same vocabulary size, from another bundle."""
    from latent_verse.data.text import BPETokenizer

    tokenizer = BPETokenizer.train(["the sea at night", "a river in the snow"] * 2, 280)
    tokenizer.save(bundle / "tokenizer")
    with pytest.raises(CheckpointError, match=naming(bundle, "tokenizer", "config.json")):
        load_bundle(bundle)


# -------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond this size: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def another(model: LVerse) -> LVerse:
    """The same with other weights everywhere."""
    with torch.no_grad():
        for parameter in (*model.vae.parameters(), *model.biart.parameters()):
            parameter.add_(1)
    return model


@pytest.mark.parametrize("size", [4096, 8192, 100_000, 300_000])
def test_a_full_disk_leaves_the_old_bundle(model, bundle, size):
    (bundle / "README.md").write_text("of the user")
    before = contents(bundle)
    another(model)
    for save, place in ((model.save_pretrained, bundle), (model.vae.save_pretrained, bundle / "vae")):
        with largest_file(size), pytest.raises(FileError, match=naming(place, "large")) as error:
            save(place)
        assert "\n" not in str(error.value)
        assert contents(bundle) == before


def test_a_full_disk_leaves_no_half_bundle(model, tmp_path):
    for save in (model.save_pretrained, model.vae.save_pretrained):
        with largest_file(8192), pytest.raises(FileError):
            save(tmp_path / "a" / "new")
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("synced", [0, 4, 9])
def test_a_killed_export_leaves_the_old_bundle_and_can_be_repeated(model, bundle, monkeypatch, synced):
    """Killed after so many files, or folders, are on the disk; before any has taken its place."""
    before = contents(bundle)
    another(model)
    if not (child := os.fork()):
        calls, sync = [], writing._sync

        def killed(path: Path) -> None:
            calls.append(path)
            if len(calls) > synced:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        monkeypatch.setattr(writing, "_sync", killed)
        try:
            model.save_pretrained(bundle)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {name: data for name, data in contents(bundle).items() if ".tmp" not in name} == before
    load_bundle(bundle)
    writing._tidied.clear()  # as in the process of the repeated command
    model.save_pretrained(bundle)
    assert contents(bundle).keys() == before.keys() and contents(bundle) != before
    load_bundle(bundle)


def test_a_killed_first_export_can_be_repeated(model, tmp_path):
    place = tmp_path / "new"
    (place / "vae" / ".model.safetensors.abcd1234.tmp").mkdir(parents=True)
    (place / "vae" / ".model.safetensors.abcd1234.tmp" / "new").write_bytes(b"half")
    model.save_pretrained(place)
    assert not [name for name in contents(place) if ".tmp" in name]
    load_bundle(place)


def test_a_users_files_are_not_replaced(model, tmp_path):
    """Those of another program have the same names."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_text("of the user")
    before = contents(tmp_path)
    for save in (model.save_pretrained, model.vae.save_pretrained):
        with pytest.raises(CheckpointError, match=naming(tmp_path)) as error:
            save(tmp_path)
        assert "\n" not in str(error.value)
        assert contents(tmp_path) == before
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=naming(tmp_path, "model.safetensors")):
        model.vae.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    model.vae.save_pretrained(tmp_path)  # beside what it does not replace
    assert (tmp_path / "other.safetensors").read_text() == "of the user"


def test_a_users_files_in_a_bundle_stay(model, bundle):
    mine = ("README.md", "vae/notes.txt", "tokenizer/notes.txt", "images/1.png")
    for name in mine:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("of the user")
    another(model).save_pretrained(bundle)
    assert all((bundle / name).read_text() == "of the user" for name in mine)
    load_bundle(bundle)


def test_a_folder_in_the_place_of_a_file_leaves_the_rest(model, bundle):
    (bundle / "biart.safetensors").unlink()
    (bundle / "biart.safetensors" / "of the user").mkdir(parents=True)
    before = contents(bundle)
    with pytest.raises(FileError, match=naming(bundle / "biart.safetensors", "folder")):
        another(model).save_pretrained(bundle)
    assert contents(bundle) == before


@pytest.mark.parametrize("place", ["file", "file/x", "pipe", "dangling", "/dev/null", "/proc/x", "/proc/self/x"])
def test_places_where_no_folder_can_be(model, tmp_path, place):
    (tmp_path / "file").write_text("of the user")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    os.mkfifo(tmp_path / "pipe")
    for save in (model.save_pretrained, model.vae.save_pretrained):
        with pytest.raises(UserError, match=naming(tmp_path / place)) as error:
            save(tmp_path / place)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "of the user"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "pipe"]


def test_others_may_read_what_was_saved(model, tmp_path):
    """As all files that are made with this umask."""
    before = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "bundle")
    finally:
        os.umask(before)
    for file in (tmp_path / "bundle").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o755 if file.is_dir() else 0o644), file


@pytest.mark.parametrize("part", ["biart", "vae", "vae alone", "info", "in info"])
def test_what_is_not_finite_is_not_written_over_a_whole_folder(tiny_augvae, tmp_path, part):
    model = make_lverse(tiny_augvae(single_level=4))
    save = model.vae.save_pretrained if part == "vae alone" else model.save_pretrained
    save(tmp_path / "a")
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    if "info" in part:
        model.info["x"] = float("nan") if part == "info" else [{"y": float("-inf")}]
    else:
        next((model.biart if part == "biart" else model.vae).parameters()).data.flatten()[-1] = float("nan")
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(UserError, match=naming("config.json" if "info" in part else folder)) as error:
            save(folder)
        assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_what_a_folder_should_have_been_is_called_by_its_name(tiny_augvae, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x").touch()
    model = make_lverse(tiny_augvae(single_level=4))
    for save, name in ((model.save_pretrained, "a bundle"), (model.vae.save_pretrained, "an AugVAE")):
        with pytest.raises(CheckpointError, match=naming(tmp_path, name)):
            save(tmp_path)
