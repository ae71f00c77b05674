"""eval_vae.py as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_verse.commands import eval_vae, train_vae
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming
from tests.tiny_lverse import make_lverse

REPO = Path(__file__).parents[2]
FLAGS = ["--gpus", "0", "--num_workers", "0", "--refresh_rate", "0"]


@pytest.fixture
def model(tmp_path, tiny_augvae) -> Path:
    """A folder of save_pretrained."""
    tiny_augvae().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def no_network_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def evaluate(tmp_path: Path, model: Path, *more: str) -> dict:
    before = set((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else set()
    flags = ["--ckpt_path", str(model), "--log_dir", str(tmp_path / "runs"), *FLAGS, *more]
    assert eval_vae.main(flags) == 0
    (run,) = set((tmp_path / "runs").glob("*")) - before
    return json.loads((run / "metrics.json").read_text()) | {"run": run}


def test_a_bundle_stands_for_its_augvae(tmp_path, tiny_augvae):
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(tmp_path / "bundle")
    images = str(write_pictures(tmp_path / "images", 4))
    of_bundle, of_its_augvae = (
        evaluate(tmp_path, tmp_path / model, "--test_dir", images, "--name", name)
        for model, name in (("bundle", "a"), ("bundle/vae", "b"))
    )
    assert of_bundle["psnr"] == of_its_augvae["psnr"] and of_bundle["codes_used_4"] == of_its_augvae["codes_used_4"]


def test_metrics_files_and_table(tmp_path, model, capsys):
    images = write_pictures(tmp_path / "images", 11)
    results = evaluate(tmp_path, model, "--test_dir", str(images), "--batch_size", "4", "--save_images", "6")
    assert results["images"] == 11 and results["skipped"] == 0
    assert 0 < results["psnr"] < 60 and -1 <= results["ssim"] <= 1
    assert {"codes_used_8", "perplexity_4", "perplexity_2"} <= results.keys()
    assert set(results["missing"]) == {"lpips", "rfid"} and "lpips" not in results and "rfid" not in results
    assert "vgg16-397923af.pth" in results["missing"]["lpips"] and "weights-inception" in results["missing"]["rfid"]
    assert "torchmetrics" in results["protocol"]["library"]
    run = results["run"]
    for name in ("original_images", "generated_images"):
        assert sorted(p.name for p in (run / name).iterdir()) == [f"{i:06d}.png" for i in range(6)]
        with Image.open(run / name / "000000.png") as image:
            assert image.size == (16, 16)
    assert (run / "grid.png").is_file() and (run / "config.yaml").is_file()
    said = capsys.readouterr().out
    page = (run / "index.html").read_text()  # images beside their reconstructions, and every metric
    assert page.count("<figcaption>image</figcaption>") == page.count("<figcaption>reconstruction</figcaption>") == 6
    assert (
        "<h3>Reconstruction</h3>" in page and "Other metrics" not in page and page.index("<img") < page.index("<table")
    )
    for name, unit, better in (("psnr", "dB", "↑ higher"), ("l1", "", "↓ lower"), ("codes_used_8", "codes", "")):
        cells = re.search(rf">reconstruction/<wbr>{name}</td>(.*?)</tr>", page)[1]
        assert f">{unit}</td>" in cells and f">{better}</td>" in cells
    assert "vgg16-397923af.pth" in page and not re.search("(src|href)=.http", page)
    assert "psnr" in said and "missing" in said and str(run) in said
    assert re.search(r"skipped +0$", said, re.MULTILINE) and re.search(r"images +11$", said, re.MULTILINE)  # counts


def test_written_images_give_the_printed_metrics(tmp_path, model):
    """The originals on disk are the centre crops, unstretched, and the metrics are those of the pairs."""
    import numpy as np

    images = write_pictures(tmp_path / "images", 3)
    results = evaluate(tmp_path, model, "--test_dir", str(images), "--batch_size", "2")

    def read(name):
        return (
            np.stack([np.asarray(Image.open(p), dtype=float) for p in sorted((results["run"] / name).iterdir())]) / 255
        )

    a, b = read("original_images"), read("generated_images")
    mse = ((a - b) ** 2).mean(axis=(1, 2, 3))
    assert results["mse"] == pytest.approx(mse.mean(), rel=0.02)  # files are rounded to 8 bits
    assert results["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=0.01)
    assert results["l1"] == pytest.approx(np.abs(a - b).mean(), rel=0.02)


def test_limit_and_batch_size_do_not_change_the_metrics(tmp_path, model):
    images = write_pictures(tmp_path / "images", 9)
    common = ["--test_dir", str(images), "--eval_images", "7", "--save_images", "0"]
    a, b = (evaluate(tmp_path, model, *common, "--batch_size", n) for n in ("7", "3"))
    assert a["images"] == b["images"] == 7
    for name in ("psnr", "ssim", "l1", "mse", "perplexity_8"):
        assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert not (a["run"] / "original_images").exists()


def test_fake_data_and_yaml_of_training(tmp_path, model, capsys):
    results = evaluate(tmp_path, model, "--fake_data", "--eval_images", "5")
    assert "images of fake" in capsys.readouterr().out
    assert results["images"] == 5 and naming("fake data").search(results["missing"]["lpips"])
    yaml = REPO / "configs" / "tiny_augvae_sl.yaml"  # finetune, another shape: those of the checkpoint count
    flags = [
        "--config",
        str(yaml),
        "--no-fake_data",
        "--resolution",
        "16",
        "--val_dir",
        str(write_pictures(tmp_path / "v", 2)),
    ]
    assert evaluate(tmp_path, model, *flags)["images"] == 2


def test_the_layout_and_the_images_of_a_run_are_remembered(tmp_path, capsys):
    images = write_pictures(tmp_path / "images", 8, classes=1) / "class0"
    (images / "a.heic").touch()
    flags = ["--dataset", "flat", "--train_dir", str(images), "--val_dir", str(images), "--name", "mine"]
    assert train_vae.main([*SMALL, *flags, "--log_dir", str(tmp_path / "train"), "--max_steps", "1"]) == 0
    capsys.readouterr()
    run = tmp_path / "train" / "mine"
    assert evaluate(tmp_path, run)["images"] == 8
    said = capsys.readouterr().out
    assert naming(run / "config.yaml", "dataset flat", images, "8 images (1 .heic not read)").search(said)
    other = write_pictures(tmp_path / "other", 3, classes=1) / "class0"
    assert evaluate(tmp_path, run, "--test_dir", str(other))["images"] == 3
    assert evaluate(tmp_path, run, "--eval_images", "2")["images"] == 2
    shutil.rmtree(images)
    assert eval_vae.main(["--ckpt_path", str(run), *FLAGS, "--log_dir", str(tmp_path / "runs")]) == 2
    assert naming(f"{images} (from {run / 'config.yaml'})", "--val_dir").search(capsys.readouterr().err)


def test_corrupt_images_are_counted_not_scored(tmp_path, model):
    images = write_pictures(tmp_path / "images", 5)
    (images / "class0" / "bad.png").write_bytes(b"not a image")
    cut = next(images.rglob("000.png")).read_bytes()
    (images / "class1" / "cut.png").write_bytes(cut[: len(cut) // 2])
    results = evaluate(tmp_path, model, "--test_dir", str(images), "--batch_size", "4")
    assert results["images"] == 5 and results["skipped"] == 2


def test_lpips_needs_the_right_weights(tmp_path, model, monkeypatch):
    """Random VGG weights where torchvision keeps its own: refused by their hash; used if the hash is the right one."""
    from torchvision.models import vgg16

    place = Path(torch.hub.get_dir()) / "checkpoints"
    place.mkdir(parents=True)
    torch.save(vgg16(weights=None).state_dict(), place / "vgg16-397923af.pth")
    images = write_pictures(tmp_path / "images", 3)
    refused = evaluate(tmp_path, model, "--test_dir", str(images))["missing"]["lpips"]
    assert naming(place / "vgg16-397923af.pth", "SHA-256", "397923af").search(refused)
    monkeypatch.setattr("latent_verse.metrics.networks.sha256", lambda path: "397923af" + 56 * "0")
    results = evaluate(tmp_path, model, "--test_dir", str(images))
    assert results["lpips"] > 0 and set(results["missing"]) == {"rfid"}


def test_rfid_is_computed_by_the_code_for_generated_images(tmp_path, model, monkeypatch):
    """With a stand-in for Inception: the rFID of eval_vae is that of the written files by eval_biart's functions."""
    from latent_verse.evaluation.samples import read_image
    from latent_verse.metrics import image_quality, networks
    from latent_verse.metrics.processes import Ranks
    from tests.stand_ins import Colours

    monkeypatch.setattr(networks, "open_inception", lambda download=False: Colours())
    images = write_pictures(tmp_path / "images", 7)
    results = evaluate(tmp_path, model, "--test_dir", str(images), "--batch_size", "3")
    assert "rfid" not in results["missing"]
    sides = []
    for name in ("original_images", "generated_images"):
        files = sorted((results["run"] / name).iterdir())
        options = {"radii": (0,), "batch_size": 4, "keep_features": 0, "keep_logits": False}
        side = image_quality.extract_features(lambda i, f=files: read_image(f[i], 16), 7, Colours(), Ranks(), **options)
        sides.append(side.moments[0])
    assert results["rfid"] == pytest.approx(image_quality.frechet_distance(*sides), rel=1e-6)
    assert results["rfid"] > 1


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ("--fake_data", ["ckpt_path"]),
        ("--ckpt_path nowhere.ckpt --fake_data", ["nowhere.ckpt"]),
        ("--ckpt_path {model} --fake_data --resolution 64", ["resolution", 64, "ckpt_path", "{model}", 16]),
        ("--ckpt_path {model} --test_dir no-such-folder", ["test_dir", "no-such-folder"]),
    ],
)
def test_mistakes(tmp_path, model, capsys, flags, facts):
    flags = flags.format(model=model).split()
    assert eval_vae.main([*flags, *FLAGS, "--log_dir", str(tmp_path / "runs")]) == 2
    assert naming(*(str(fact).format(model=model) for fact in facts)).search(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--accelerator", "mps"], "mps"),
        (["--accelerator", "tpu"], "torch_xla"),
        (["--precision", "transformer-engine"], "transformer_engine"),
    ],
)
def test_what_the_machine_or_its_packages_lack(tmp_path, model, capsys, flags, named):
    if importlib.util.find_spec(named) or (named == "mps" and torch.backends.mps.is_available()):
        pytest.skip("this machine has what the test asks for")
    common = ["--ckpt_path", str(model), "--fake_data", *FLAGS, "--log_dir", str(tmp_path / "runs")]
    assert eval_vae.main([*common, *flags]) == (2 if named == "mps" else 1)  # a package: 1
    said = capsys.readouterr().err
    assert named in said.lower() and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.slow
def test_more_processes_than_images(tmp_path, model):
    images = write_pictures(tmp_path / "images", 3)
    flags = ["--ckpt_path", str(model), "--log_dir", str(tmp_path / "runs"), *FLAGS, "--test_dir", str(images)]
    done = subprocess.run(
        [sys.executable, "eval_vae.py", *flags, "--eval_images", "1", "--accelerator", "cpu", "--gpus", "2"],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["images"] == 1


def test_configs_with_lpips_need_no_vgg_to_evaluate(tmp_path, model):
    recipe = str(REPO / "configs" / "imagenet_augvae_ml.yaml")
    images = write_pictures(tmp_path / "images", 2)
    flags = ["--config", recipe, "--resolution", "16", "--test_dir", str(images), "--no-log_images"]
    assert "lpips" in evaluate(tmp_path, model, *flags)["missing"]


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path, model, one_thread):
    images = write_pictures(tmp_path / "images", 11)  # 6 and 5: the last batch of one process is empty
    common = ["--test_dir", str(images), "--batch_size", "5", "--save_images", "11"]
    one = evaluate(tmp_path, model, *common)
    flags = ["--ckpt_path", str(model), "--log_dir", str(tmp_path / "runs"), *FLAGS, *common, "--name", "two"]
    done = subprocess.run(
        [sys.executable, str(REPO / "eval_vae.py"), *flags, "--accelerator", "cpu", "--gpus", "2"],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "runs" / "two" / "metrics.json").read_text())
    assert two["images"] == 11
    for name in ("psnr", "ssim", "l1", "mse", "perplexity_8", "codes_used_4"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
    for name in ("original_images", "generated_images"):
        for i in range(11):
            ours, theirs = (p / name / f"{i:06d}.png" for p in (one["run"], tmp_path / "runs" / "two"))
            assert ours.read_bytes() == theirs.read_bytes()


def test_reconstructions_that_are_not_finite_are_an_error(tmp_path, tiny_augvae, capsys):
    """Its weights are finite, and overflow: no metric is printed or written as if it were one."""
    model = tiny_augvae()
    with torch.no_grad():
        model.decoders[-1].conv_out.weight.mul_(3e38)
    model.save_pretrained(tmp_path / "model")
    images = write_pictures(tmp_path / "images", 5)
    flags = ["--ckpt_path", str(tmp_path / "model"), "--log_dir", str(tmp_path / "runs"), *FLAGS]
    assert eval_vae.main([*flags, "--test_dir", str(images), "--batch_size", "4"]) == 2
    said = capsys.readouterr()
    assert naming(tmp_path / "model", "not finite", "--precision").search(said.err) and said.err.count("\n") == 1
    assert "psnr" not in said.out and not list((tmp_path / "runs").rglob("metrics.json"))


def test_a_folder_in_which_nothing_can_be_written_is_refused_before_the_data_is_read(tmp_path, model, capsys):
    (tmp_path / "file").touch()
    before = set(tmp_path.iterdir())
    for place, fact in ((tmp_path / "file" / "runs", "file is not a folder"), (tmp_path / ("a" * 300), 255)):
        argv = ["--ckpt_path", str(model), *FLAGS, "--test_dir", "absent", "--log_dir", str(place)]
        assert eval_vae.main(argv) == 2
        said = capsys.readouterr().err
        assert naming("log_dir", fact).search(said) and said.count("\n") == 1
    argv = ["--ckpt_path", str(model), *FLAGS, "--test_dir", "absent", "--log_dir", str(tmp_path / "runs")]
    assert eval_vae.main(argv) == 2 and naming("absent").search(capsys.readouterr().err)
    assert set(tmp_path.iterdir()) == before  # and nothing is left of it
