"""The commands of README.md, docs/guide.md and docs/evaluation.md, run one after the other as a reader would.

They run in a folder with the data that they name. Flags that make each run take milliseconds on one CPU are added. What
torchrun and Slurm start is only parsed (test_readme.py).
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from latent_verse.commands import eval_biart, eval_vae, generate, train_biart, train_vae
from latent_verse.metrics import networks
from tests.documented_commands import REPO, commands, flags
from tests.image_runs import SMALL, write_pictures
from tests.stand_ins import Colours, Words, write_pairs

SMALL_BIART = (
    "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 12 --batch_size 4 --epochs 1 "
    "--optimizer adamw --muon_learning_rate null --warmup_steps 0 --num_workers 0 --gpus 0 --logger csv "
    "--refresh_rate 0 --num_samples 2 --precision 32 --limit_train_batches 2 --limit_val_batches 1"
).split()
ADDED = {
    "train_vae.py": [*SMALL, "--loss_type", "mse", "--precision", "32", "--limit_train_batches", "2"],
    "eval_vae.py": ["--num_workers", "0", "--gpus", "0"],
    "train_biart.py": SMALL_BIART,
    "eval_biart.py": [],
    "generate.py": ["--gpus", "0"],
}
MAINS = {
    "train_vae.py": train_vae.main,
    "eval_vae.py": eval_vae.main,
    "train_biart.py": train_biart.main,
    "eval_biart.py": eval_biart.main,
    "generate.py": generate.main,
}


def write_coco(folder: Path, split: str, count: int) -> list[dict]:
    """Images in folder/split, their captions in folder/annotations; returns the images of a Karpathy file."""
    made = sorted(write_pairs(folder / split, count).glob("*.png"))
    texts = [image.with_suffix(".txt").read_text().splitlines() for image in made]
    images = [image.rename(image.with_name(f"COCO_{split}_{i:012d}.png")) for i, image in enumerate(made)]
    content = {
        "images": [{"id": i, "file_name": image.name} for i, image in enumerate(images)],
        "annotations": [{"image_id": i, "caption": text} for i, of_one in enumerate(texts) for text in of_one],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return [
        {
            "filepath": split,
            "filename": image.name,
            "split": "test",
            "cocoid": i,
            "sentences": [{"raw": text} for text in of_one],
        }
        for i, (image, of_one) in enumerate(zip(images, texts, strict=True))
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory of a user: configs/, and a little of every kind of data that README.md names."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(REPO / "configs")
    for split, count in (("train", 8), ("val", 4)):
        for name in ("data", "imagenet"):
            write_pictures(Path(name, split), count)
        for image in Path("data", split).glob("*/*.png"):
            image.with_suffix(".txt").write_text(f"a thing of {image.parent.name}\nnumber {image.stem}\n")
    for name in ("more", "photos", "emoji"):
        shutil.copytree("data", name)
    write_pictures(Path("data/classes"), 4)
    shutil.copy("photos/val/class0/000.png", "photo.png")
    for folder, numbers in (("shards", range(10)), ("shards/val", range(1))):
        Path(folder).mkdir()
        for i in numbers:
            with tarfile.open(f"{folder}/{i:04d}.tar", "w") as tar:
                tar.add("photo.png", "0.png")
    write_coco(Path("coco"), "train2017", 8)
    write_coco(Path("coco"), "val2017", 4)
    Path("coco/dataset_coco.json").write_text(json.dumps({"images": write_coco(Path("coco"), "val2014", 6)}))
    shutil.copytree("coco/val2014", "other/images", ignore=shutil.ignore_patterns("*.txt"))
    Path("other/captions.json").write_text(json.dumps([{"image_id": i, "caption": "a circle"} for i in range(6)]))
    monkeypatch.setenv("PATH", "")  # no Java, which differs from machine to machine
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no network of a metric but the two stand-ins
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(networks, "open_inception", Colours)
    monkeypatch.setattr(networks, "open_clip_network", lambda *arguments: Words())


@pytest.mark.usefixtures("project", "one_thread")
def test_every_command_runs_in_order():
    ran = []
    for line in commands("python ", [REPO / name for name in ("README.md", "docs/guide.md", "docs/evaluation.md")]):
        if not line.startswith("python "):  # under Slurm
            continue
        script = line.split()[1]
        levels = ["--attn_resolutions", "8"] if "augvae_sl" in line and script == "train_vae.py" else []
        gpus = ["--gpus", "0"] if "--gpus" in line else []
        more = ["--epochs", "2"] if "--resume" in line else []  # of one epoch, as the run before it, nothing is left
        assert MAINS[script]([*flags(line, script), *ADDED[script], *levels, *gpus, *more]) == 0, line
        ran.append(script)
    assert set(ran) == set(MAINS)
