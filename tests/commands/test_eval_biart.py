"""eval_biart.py as a user runs it: tiny random bundles, stand-ins for Inception and CLIP, no network."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.biart.sampling import log_likelihood
from latent_verse.commands import eval_biart, generate
from latent_verse.config.cli import parse
from latent_verse.config.evaluate import EvalBiARTConfig, EvalDataConfig
from latent_verse.data.shapes import World
from latent_verse.evaluation.pairs import Pairs, ordered
from latent_verse.inference.image_io import load_image
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics import networks
from latent_verse.metrics.image_quality import as_pil
from tests.eval_biart_runs import run
from tests.messages import naming
from tests.stand_ins import Colours, Oracle, Words, write_pairs

pytestmark = pytest.mark.usefixtures("one_thread", "no_caches")

REPO = Path(__file__).parents[2]


# --------------------------------------------------------------------------------------------------------- everything


def test_one_command_reports_every_metric_with_all_that_identifies_it(bundle, pairs, tmp_path, stand_ins, capsys):
    classes = tmp_path / "classes"
    for name, first in (("red_thing", 0), ("blue", 6)):
        (classes / name).mkdir(parents=True)
        for i in range(first, first + 3):
            shutil.copy(pairs / f"p{i:03d}.png", classes / name)
    flags = ["--candidates", 2, "--is_splits", 2, "--classes_dir", classes, "--retrieval_pictures", 5]
    out = run(tmp_path, "--model", bundle, "--test_dir", pairs, *flags, "--round_trip_pairs", 6)
    model = LVerse.from_pretrained(bundle, device="cpu")
    for name, record in out["figures"].items():
        assert math.isfinite(record["value"]), name
        assert re.search(r"\w \d+\.\d", record["library"]) and record["samples"] > 0 and record["protocol"], name
        assert record["seed"] == 0 and record["checkpoint"] == model.fingerprints, name
    names = set(out["figures"])
    for selection in ("", "best_of_2_by_model/", "best_of_2_by_clip/"):
        for metric in ("fid_0", "fid_1", "fid_2", "fid_4", "fid_8", "inception_score", "precision", "recall"):
            assert f"generation/{selection}{metric}" in names
        assert out["figures"][f"generation/{selection}clip_score"]["drawn"] == 2
    assert names >= {"captions/bleu_4", "captions/cider", "captions/rouge_l", "captions/distinct_2"}
    assert names >= {f"retrieval/text_given_image/image_to_text/r@{k}" for k in (1, 5, 10)}
    assert names >= {f"retrieval/image_given_text/text_to_image/r@{k}" for k in (1, 5, 10)}
    assert names >= {"zero_shot/text_given_image/top_1", "zero_shot/image_given_text/top_1"}
    assert names >= {"round_trip/image_text_image/fid_0", "round_trip/image_text_image/clip_similarity"}
    assert names >= {"round_trip/text_image_text/cider", "likelihood/text_given_image/bits_per_token"}
    assert set(out["missing"]) == {
        f"{task}/{m}" for task in ("captions", "round_trip/text_image_text") for m in ("meteor", "spice")
    }
    f = out["figures"]
    assert f["generation/best_of_2_by_clip/clip_score"]["value"] > f["generation/clip_score"]["value"]
    assert f["generation/best_of_2_by_model/log_p_text"]["value"] > f["generation/log_p_text"]["value"]
    assert f["generation/fid_0"]["samples"] == 24 and f["generation/fid_0"]["references"] == 12
    assert "torchmetrics" in f["generation/fid_0"]["library"] and "radius 8" in f["generation/fid_8"]["protocol"]
    assert f["zero_shot/text_given_image/top_1"]["samples"] == 6
    assert out["draw"].items() >= {"captions": 24, "pictures": 12, "seed": 0}.items()
    assert len(out["draw"]["sha256"]) == 16

    said = capsys.readouterr().out
    assert "best by CLIP of 2 images" in said and "missing: captions/meteor" in said and "java: false" in said
    run_folder = tmp_path / "runs" / "run"
    page = (run_folder / "index.html").read_text()
    galleries = ("Images generated for texts", "Captions generated for images")
    for heading in (*galleries, "Best", "Median", "Worst", "Missing"):
        assert f">{heading}<" in page
    groups = ("Image quality", "Text quality", "Likelihood", "Retrieval", "Classification", "Round trips")
    assert re.findall("<h3>(.*?)</h3>", page)[-len(groups) :] == list(groups)
    assert all("unit" in r for n, r in f.items() if not re.search("/(fid_|inception)", n))
    # every generated image stands beside the true one, and every caption beside its references
    shown = page.count("<figcaption>generated</figcaption>")
    assert shown == page.count("<figcaption>true image</figcaption>") >= 12
    assert page.count(">references</dt>") == page.count("<figcaption>image</figcaption>") >= 9
    assert page.count("data:image/png;base64,") >= 9 and not re.search(r"(src|href)=.http", page)
    written = json.loads((run_folder / "captions.json").read_text())
    assert [row["caption"] for row in written] == [
        text for [text] in model.image_to_text([pairs / f"p{i:03d}.png" for i in range(12)])
    ]
    config, _ = parse(EvalBiARTConfig, ["--config", str(run_folder / "config.yaml")], "")
    assert config.generation.candidates == 2


def test_metrics_are_those_of_the_files(bundle, pairs, tmp_path, stand_ins):
    """FID and CLIP score once more from what the run has written, by torchmetrics and the network."""
    from torchmetrics.image import FrechetInceptionDistance

    flags = ["--model", bundle, "--test_dir", pairs, "--tasks", "generation", "--eval_captions", 9]
    out = run(tmp_path, *flags)["figures"]
    metric = FrechetInceptionDistance(feature=Colours())
    files = sorted((tmp_path / "runs" / "run" / "samples").glob("*.png"))
    assert len(files) == 9
    images = [Image.open(file) for file in files]
    as_tensor = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)  # noqa: E731
    metric.update(torch.stack([as_tensor(image) for image in images]), real=False)
    real = [((load_image(path, 16) + 1) * 127.5).round().to(torch.uint8) for path in sorted(pairs.glob("*.png"))]
    metric.update(torch.stack(real), real=True)
    assert out["generation/fid_0"]["value"] == pytest.approx(metric.compute().item(), rel=1e-3)
    texts = [image.text["text"] for image in images]
    cosine = (Words().images(images) * Words().texts(texts)).sum(1).mean().item()
    assert out["generation/clip_score"]["value"] == pytest.approx(100 * cosine, rel=1e-4)


def test_likelihoods_are_the_models(bundle, pairs, tmp_path):
    out = run(tmp_path, "--model", bundle, "--test_dir", pairs, "--tasks", "likelihood", "--likelihood_pairs", 3)
    model = LVerse.from_pretrained(bundle, device="cpu")
    data = Pairs(EvalDataConfig(dataset="pairs", test_dir=str(pairs)), 16, 0)
    total = 0.0
    for d in data.sample(3, 0):
        codes = model.codes([data.image(d.index)])
        total += log_likelihood(model.biart, model.encode_texts([d.caption]), codes, "text").total_B.item()
    record = out["figures"]["likelihood/image_given_text/bits_per_code"]
    assert record["value"] == pytest.approx(-total / math.log(2) / 3 / 16, rel=1e-4)
    assert record["interval"][0] < record["value"] < record["interval"][1] and record["samples"] == 3


def test_a_single_pair_has_no_interval(bundle, pairs, tmp_path):
    out = run(tmp_path, "--model", bundle, "--test_dir", pairs, "--tasks", "likelihood", "--likelihood_pairs", 1)
    assert len(out["figures"]) == 6
    assert not any("interval" in record or "standard_error" in record for record in out["figures"].values())


def test_without_networks_the_rest_still_runs_and_the_missing_files_are_named(bundle, pairs, tmp_path, capsys):
    flags = ["--tasks", "generation", "captions", "--candidates", 2]
    out = run(tmp_path, "--model", bundle, "--test_dir", pairs, *flags)
    assert all("--download" in out["missing"][f"generation/{name}"] for name in ("fid_0", "recall", "clip_score"))
    assert out["missing"]["generation/best_of_2_by_clip/clip_score"] == out["missing"]["generation/clip_score"]
    assert "generation/log_p_text" in out["figures"] and "captions/cider" in out["figures"]
    place = tmp_path / "torch" / "hub" / "checkpoints" / networks.INCEPTION
    assert str(place) in out["missing"]["generation/fid_0"] == out["missing"]["generation/recall"]
    reason = out["missing"]["generation/clip_score"]
    assert "ViT-B-32.pt" in reason and "https://" in reason
    said = capsys.readouterr().out
    assert said.count(str(place)) == 1  # for all the metrics that need it
    assert not place.exists()


# -------------------------------------------------------------------------------------------------- resuming, caching


def test_classification_reads_images_batch_by_batch_and_skips_broken_ones(bundle, pairs, tmp_path, capsys, monkeypatch):
    classes = tmp_path / "classes"
    for name, first in (("red", 0), ("blue", 6)):
        (classes / name).mkdir(parents=True)
        for i in range(first, first + 3):
            shutil.copy(pairs / f"p{i:03d}.png", classes / name)
    flags = ["--model", bundle, "--test_dir", pairs, "--tasks", "zero_shot", "--classes_dir", classes]
    flags += ["--class_prompt", "{} {0.__class__} {"]  # plain text but for {}
    whole = run(tmp_path, *flags, name="whole")
    held = []
    codes = LVerse.codes
    monkeypatch.setattr(LVerse, "codes", lambda self, images: held.append(len(images)) or codes(self, images))
    assert run(tmp_path, *flags, "--batch_size", 2, name="batches")["figures"] == whole["figures"]
    assert held == [2, 2, 2]
    first = ordered(sorted(str(file.relative_to(classes)) for file in classes.glob("*/*.png")), 0)[0]
    sorted(classes.glob("*/*.png"))[first].write_bytes(b"no image")
    assert run(tmp_path, *flags, name="broken")["figures"]["zero_shot/text_given_image/top_1"]["samples"] == 5
    argv = [*map(str, flags), "--class_pictures", "1", "--gpus", "0", "--log_dir", str(tmp_path / "runs")]
    assert eval_biart.main(argv) == 2
    assert naming("classes_dir", 1).search(capsys.readouterr().err)


def test_captions_that_are_too_long_are_cut_and_counted(bundle, pairs, tmp_path, recwarn):
    (pairs / "p003.txt").write_text("a red circle " * 30 + "\na red circle")
    flags = ["--tasks", "generation", "likelihood", "retrieval", "--retrieval_captions", 2]
    out = run(tmp_path, "--model", bundle, "--test_dir", pairs, *flags)
    assert out["about"]["generation"]["draw"]["cut_to_text_len"] == 1
    assert out["about"]["likelihood"]["cut_to_text_len"] == out["about"]["retrieval"]["cut_to_text_len"] == 1
    assert not [w for w in recwarn if "cut to" in str(w.message)]


def test_a_lower_precision_is_named_with_every_metric(bundle, pairs, tmp_path, capsys):
    flags = ["--model", bundle, "--test_dir", pairs, "--tasks", "generation", "likelihood"]
    out = run(tmp_path, *flags, "--dtype", "bfloat16")
    assert all(record["dtype"] == "bfloat16" for record in out["figures"].values())
    assert capsys.readouterr().out.count("bfloat16") == len(out["figures"])
    argv = [*map(str, flags), "--gpus", "0", "--log_dir", str(tmp_path / "runs"), "--name", "run"]
    assert eval_biart.main(argv) == 2
    assert naming("dtype", "bfloat16", "float32").search(capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------- other systems' outputs


def test_another_systems_images_by_the_same_command(bundle, pairs, tmp_path, stand_ins):
    texts = ["a red circle", "a blue circle", "a green circle"]
    flags = ["--text", *texts, "--num", 2, "--out", tmp_path / "made", "--gpus", 0]
    assert generate.main(["--model", str(bundle), *map(str, flags)]) == 0
    flags = ["--generated_dir", tmp_path / "made", "--test_dir", pairs, "--fid_resolution", 16, "--is_splits", 1]
    out = run(tmp_path, *flags)
    f = out["figures"]
    assert f["generation/fid_0"]["samples"] == 3 and f["generation/fid_0"]["drawn"] == 2
    assert f["generation/best_of_2_by_clip/clip_score"]["value"] >= f["generation/clip_score"]["value"]
    assert "generation/best_of_2_by_model/fid_0" not in f  # no log p by the model is known
    assert f["generation/fid_0"]["checkpoint"].keys() == {"generated_dir"} and not any(
        n.startswith("captions") for n in f
    )
    own = run(tmp_path, "--model", bundle, "--test_dir", pairs, "--tasks", "generation", name="own")
    flags = ["--generated_dir", tmp_path / "runs" / "own" / "samples", "--test_dir", pairs, "--fid_resolution", 16]
    again = run(tmp_path, *flags, name="again")
    for name, record in own["figures"].items():
        assert again["figures"][name]["value"] == pytest.approx(record["value"], rel=1e-6), name
    assert out["about"]["generation"]["generated_dir"]["captions_of_the_draw"] == 0
    assert again["about"]["generation"]["generated_dir"]["captions_of_the_draw"] == 24


def test_images_without_captions_have_no_clip_score(pairs, tmp_path, stand_ins):
    made = write_pairs(tmp_path / "made", 5)
    (made / "p002.txt").unlink()
    out = run(tmp_path, "--generated_dir", made, "--test_dir", pairs, "--fid_resolution", 16, "--is_splits", 1)
    assert naming(1, 5, "caption").search(out["missing"]["generation/clip_score"])
    page = (tmp_path / "runs" / "run" / "index.html").read_text()  # they are shown all the same
    assert ">First<" in page and page.count("<figcaption>generated</figcaption>") == 5
    assert out["figures"]["generation/fid_0"]["samples"] == 5


def test_with_too_few_images_metrics_are_missing(pairs, tmp_path, stand_ins):
    made = write_pairs(tmp_path / "made", 1)
    out = run(tmp_path, "--generated_dir", made, "--test_dir", pairs, "--fid_resolution", 16)
    for name, facts in (
        ("fid_8", [2, "1 generated", "12 reference"]),
        ("inception_score", ["is_splits", 10, 1]),
        ("recall", ["prc_neighbours", 3, "1 generated", "12 reference"]),
    ):
        assert naming(*facts).search(out["missing"][f"generation/{name}"])
    assert set(out["figures"]) == {"generation/clip_score"}


def test_the_reference_images_have_no_distance_from_themselves(pairs, tmp_path, stand_ins):
    flags = ["--generated_dir", pairs, "--test_dir", pairs, "--fid_resolution", 16, "--is_splits", 1]
    out = run(tmp_path, *flags)["figures"]
    for k in (0, 1, 2, 4, 8):
        assert out[f"generation/fid_{k}"]["value"] == pytest.approx(0, abs=0.01)  # sums of squares of hundreds
    assert out["generation/precision"]["value"] == out["generation/recall"]["value"] == 1


def test_another_systems_captions_by_the_same_command(pairs, tmp_path, capsys):
    texts = {f"p{i:03d}": (pairs / f"p{i:03d}.txt").read_text().splitlines() for i in range(12)}
    rows = [{"image": f"{name}.png", "captions": of_it[:1]} for name, of_it in texts.items()]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = run(tmp_path, "--captions_file", file, "--test_dir", pairs)
    assert out["figures"]["captions/bleu_4"]["value"] == pytest.approx(1)
    assert out["figures"]["captions/bleu_4"]["checkpoint"].keys() == {"captions_file"}
    assert "2 references per image" in out["figures"]["captions/cider"]["protocol"]
    written = tmp_path / "runs" / "run" / "captions.json"
    again = run(tmp_path, "--captions_file", written, "--test_dir", pairs, name="again")
    assert again["figures"]["captions/cider"]["value"] == out["figures"]["captions/cider"]["value"]
    assert again["figures"]["captions/cider"]["written"] == "captions of captions.json"
    assert eval_biart.main(["--compare", str(tmp_path / "runs" / "run"), str(tmp_path / "runs" / "again")]) == 0
    assert "not comparable" not in capsys.readouterr().out  # the author is no part of the protocol


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_truth_of_shapes_is_exact_for_an_oracle(bundle, tmp_path, monkeypatch):
    """A model that generates only what is true is right in everything, round trips included."""
    world = World.preset("small")

    class Perfect(Oracle):
        def sample_scored(self, texts, count, seed, **settings):
            return [[self.world.render(self.scene_of(t))] * count for t in texts], torch.zeros(len(texts), count)

        def image_to_text(self, images, **settings):
            images = [as_pil(x) if torch.is_tensor(x) else x for x in images]
            return super().image_to_text(images)

        def encode_texts(self, texts):
            return torch.tensor([[hash(text) % 10**9] for text in texts])

    perfect = Perfect(world)
    perfect.fingerprints, perfect.null_trained = {"biart": "oracle"}, True
    perfect.vae = type("VAE", (), {"config": type("Config", (), {"resolution": 32})})
    monkeypatch.setattr(LVerse, "from_pretrained", lambda *a, **k: perfect)
    flags = "--dataset shapes --test_size 12 --tasks shapes round_trip captions --round_trip_pairs 8".split()
    f = run(tmp_path, "--model", bundle, *flags)["figures"]
    page = (tmp_path / "runs" / "run" / "index.html").read_text()
    assert "Shapes: unseen scenes" in page and "Shapes: held-out combinations" in page and "read as" not in page
    assert page.count("generated: right") == 2 * 8 * 2 and "wrong" not in page.partition("<main")[2]
    for split in ("val", "heldout"):
        for direction in ("text_to_image", "image_to_text"):
            for attribute in ("all", "count", "colour", "shape", "size", "layout"):
                record = f[f"shapes/{split}/{direction}/{attribute}"]
                assert record["value"] == 1 and record["samples"] == 12
                assert record["interval"] == pytest.approx([0.757, 1], abs=1e-3)
        assert f[f"shapes/{split}/reconstruction/all"]["value"] == 1
    for trip in ("image_text_image", "text_image_text"):
        assert f[f"round_trip/{trip}/shapes/all"]["value"] == 1 and f[f"round_trip/{trip}/shapes/all"]["samples"] == 8
    assert f["captions/bleu_1"]["value"] > 0.5


def test_a_shipped_model_by_its_name(tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "shapes", "--dataset", "shapes", "--test_size", "4", "--tasks", "shapes", "--gpus", "0"]
    assert eval_biart.main(flags) == 0
    figures = json.loads(Path("results/eval-shapes-shapes/metrics.json").read_text())["figures"]
    assert figures["shapes/val/reconstruction/all"]["value"] == 1
    shutil.copytree(write_pairs(tmp_path / "pairs", 3), "others")  # texts with other words: no warning for each batch
    flags = ["--model", "shapes", "--test_dir", "others", "--tasks", "likelihood", "--gpus", "0"]
    assert eval_biart.main(flags) == 0
    assert not [one for one in recwarn if "unknown words" in str(one.message)]
    assert eval_biart.main(["--model", "shpaes", "--test_dir", "others", "--gpus", "0"]) == 2
    assert naming("shpaes", "shapes").search(capsys.readouterr().err)


def test_help_answers_without_torch():
    command = [sys.executable, "-X", "importtime", str(REPO / "eval_biart.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and "--generated_dir" in done.stdout
    assert not re.search(r"\| +(torch|open_clip|torchmetrics|numpy)$", done.stderr, re.M)


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(bundle, pairs, tmp_path):
    """By the command line, without Inception and CLIP, which tests of the parts cover."""
    flags = ["--model", bundle, "--test_dir", pairs, "--candidates", 2, "--round_trip_pairs", 5, "--batch_size", 3]
    one = run(tmp_path, *flags)
    argv = [*flags, "--log_dir", tmp_path / "runs", "--name", "two", "--no-java", "--gpus", 2, "--accelerator", "cpu"]
    done = subprocess.run(
        [sys.executable, str(REPO / "eval_biart.py"), *map(str, argv)],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "runs" / "two" / "metrics.json").read_text())
    assert two["figures"].keys() == one["figures"].keys() and two["missing"] == one["missing"]
    for name, record in one["figures"].items():
        assert two["figures"][name]["value"] == pytest.approx(record["value"], rel=1e-3, abs=1e-9), name
    assert done.stdout.count("Written to") == 1
    broken = subprocess.run(
        [sys.executable, str(REPO / "eval_biart.py"), *map(str, argv), "--guidance", "2"],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert broken.returncode == 2 and naming("guidance", 1.0, 2.0).search(broken.stderr)
    assert "Traceback" not in broken.stderr
