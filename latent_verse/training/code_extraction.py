"""Encoding a dataset of pairs once with the frozen AugVAE, for training from codes."""

from __future__ import annotations

from pathlib import Path

import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.biart import Pretrained
from latent_verse.checkpoints.ckpt_files import fingerprint
from latent_verse.config.messages import counted
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.data.codes import FORMAT
from latent_verse.data.codes_writer import contents_of, extract, work_of
from latent_verse.data.datasets import how_many, open_pairs, source_of
from latent_verse.data.loader_processes import worker_count
from latent_verse.data.pairs import PairShards, work_of_shards
from latent_verse.files import only_writer
from latent_verse.training.biart_setup import choose_tokenizer
from latent_verse.training.trainer import choose_devices


def extract_codes(config: TrainBiARTConfig, vae: AugVAE, pretrained: Pretrained | None = None) -> dict[str, Path]:
    """Write the codes of train_dir and val_dir, with the tokenizer of `pretrained`, to <extract_codes>/train and /val.

    Returns {split: folder}.

    Raises:
        DataError: see `data.codes_writer.extract`.
        FileError: nothing can be written there, or (InUse) another process writes there.
    """
    with only_writer(Path(config.codes.extract_codes), "extract_codes"):
        return _extract(config, vae, pretrained)


def _extract(config: TrainBiARTConfig, vae: AugVAE, pretrained: Pretrained | None) -> dict[str, Path]:
    d, c, t = config.data, config.codes, config.trainer
    accelerator, _ = choose_devices(t)
    device = torch.device({"gpu": "cuda", "mps": "mps"}.get(accelerator, "cpu"))
    resolution = vae.to(device).config.resolution
    datasets = open_pairs(d, resolution, t.seed, augment=False)
    tokenizer = choose_tokenizer(config, datasets["train"], pretrained=pretrained)
    folders = {split: Path(c.extract_codes) / split for split in datasets}
    for split, dataset in datasets.items():
        print(f"{split}: {how_many(dataset)} of {source_of(d, split)}", flush=True)
        crops = c.crops_per_image if split == "train" else 1
        shards = isinstance(dataset, PairShards)
        plan = {
            "format": FORMAT,
            "vae": fingerprint(vae),
            "codebook_size": vae.config.num_tokens,
            "image_len": vae.num_codes,
            "resolution": resolution,
            "tokenizer": tokenizer.fingerprint,
            "text_vocab": tokenizer.vocab_size,
            "source": source_of(d, split),
            "dataset": d.dataset,
            "crops_per_image": crops,
            "resize_ratio": d.resize_ratio if crops > 1 else None,
            "shard_size": None if shards else c.shard_size,
            "seed": t.seed,
        }
        if shards:
            work, total = work_of_shards(dataset, crops), None
        else:
            work, total = work_of(dataset, crops, c.shard_size), len(dataset)
            plan |= {"pictures": total, "contents": contents_of(dataset)}
            if d.dataset == "shapes":
                w = dataset.world
                plan["shapes"] = {"world": w.name, "fingerprint": w.fingerprint, "split": dataset.split, "seed": t.seed}
        folder = folders[split]
        meta = extract(
            work,
            folder,
            lambda x: vae.codes(x.to(device), validate=False),  # a loader's images
            tokenizer,
            plan,
            batch_size=d.batch_size,
            threads=worker_count(d.num_workers),
            total=total,
            progress=bool(t.refresh_rate),
        )
        print(
            f"{folder}: {counted(meta['pairs'], 'pair')}, {counted(meta['captions'], 'caption')}, "
            f"{counted(meta['skipped'], 'unreadable image')}; "
            f"AugVAE {meta['vae']}, tokenizer {tokenizer.name} {meta['tokenizer']}"
        )
    return folders
