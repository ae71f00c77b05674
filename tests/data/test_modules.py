"""ImageDataModule: ranks, resume in the middle of an epoch through Lightning's own checkpoints, errors, counts."""

import io
import itertools
import logging
import tarfile
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from latent_verse.config.train import ImageDataConfig
from latent_verse.data import DataError, ImageDataModule, open_images
from latent_verse.data.modules import EpochBatches, EvalBatches
from tests.messages import naming


def module(resolution=8, seed=0, splits=None, **settings):
    """A data module with the splits whose folders are given, or the given ones."""
    data = ImageDataConfig(**{"dataset": "fake", "batch_size": 4, "num_workers": 0, "shuffle_buffer": 8, **settings})
    if splits is None:
        splits = [s for s in ("train", "val") if data.dataset == "fake" or getattr(data, f"{s}_dir")]
    return ImageDataModule(open_images(data, resolution, seed, splits), data, seed)


def image_bytes(i):
    pixels = np.random.default_rng(i).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((18, 12)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same 21 images as a flat folder, in class folders and in 3 shards (label = number)."""
    root = tmp_path_factory.mktemp("images")
    for i in range(21):
        for path in (root / "flat" / f"{i:02d}.png", root / "classes" / f"{i % 3}" / f"{i:02d}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(i))
    (root / "shards").mkdir()
    for k in range(3):
        with tarfile.open(root / "shards" / f"{k}.tar", "w") as tar:
            for i in range(7 * k, 7 * k + 7):
                for name, data in ((f"{i}.png", image_bytes(i)), (f"{i}.cls", str(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {"flat": root / "flat", "imagefolder": root / "classes", "webdataset": root / "shards"}


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def same(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


# ------------------------------------------------------------------------------------------------------------- batches


def test_epoch_batches_split_each_permutation_over_ranks():
    ranks = [EpochBatches(23, batch_size=3, rank=r, world=2, seed=7) for r in range(2)]
    first = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [3, 3] == [len(batches) for batches in first]
    seen = [index for batches in first for batch in batches for _, index in batch]
    assert len(seen) == len(set(seen)) == 18
    one = list(EpochBatches(23, batch_size=6, rank=0, world=1, seed=7))
    assert [a + b for a, b in zip(*first, strict=True)] == one  # the same global batches, however split
    ranks[0].start_at(1, 0)
    second = list(ranks[0])
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert [i for batch in second for _, i in batch] != [i for batch in first[0] for _, i in batch]


@pytest.mark.parametrize("samples, size", [(5, 12), (3, 16), (23, 8), (24, 24)])
def test_epochs_of_any_size_are_passes_over_all_samples_one_after_another(samples, size):
    def epochs(batch_size, rank=0, world=1, first=0):
        batches = EpochBatches(samples, batch_size, rank, world, seed=7, size=size)
        assert len(batches) == size // (batch_size * world)
        for epoch in range(samples):
            batches.start_at(epoch, first if epoch == 0 else 0)
            yield from batches

    found = [key for batch in epochs(4) for key in batch]
    assert len(found) == samples * size and max(map(len, epochs(4))) == 4
    for number in range(size):  # so many whole passes, each in an order of its own
        one_pass = found[number * samples : (number + 1) * samples]
        assert sorted(one_pass) == [(number, index) for index in range(samples)]
    assert len({tuple(index for _, index in found[n * samples : (n + 1) * samples]) for n in range(size)}) > 1
    joined = [a + b for a, b in zip(epochs(2, 0, 2), epochs(2, 1, 2), strict=True)]
    assert joined == list(epochs(4))  # the same global batches, however split
    assert list(epochs(4, first=1)) == joined[1:]  # as a resumed run continues


@pytest.mark.parametrize(
    "samples,world,batch_size", [(10, 1, 4), (10, 2, 4), (9, 2, 4), (3, 4, 2), (1, 2, 8), (17, 3, 2)]
)
def test_eval_batches_take_each_sample_once_in_equal_steps(samples, world, batch_size):
    ranks = [list(EvalBatches(samples, batch_size, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(samples))
    assert world > 1 or all(ranks[0])


@pytest.mark.parametrize("kind", ["flat", "imagefolder", "webdataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_over_ranks_sees_each_image_once(folders, kind, workers, monkeypatch):
    data = module(dataset=kind, val_dir=folders[kind], batch_size=5, num_workers=workers)
    reference = sorted(image.sum().item() for batch in data.val_dataloader() for image in batch[0])
    assert len(reference) == 21
    seen, lengths = [], set()
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(
            b[0].shape[1:] == (3, 8, 8) and b[0].dtype == torch.uint8 and len(b[0]) == len(b[1]) for b in batches
        )
        lengths.add(len(batches))
        seen += [image.sum().item() for batch in batches for image in batch[0]]
    assert sorted(seen) == reference and len(lengths) == 1


@pytest.mark.parametrize("kind", ["flat", "webdataset"])
def test_ranks_train_on_different_samples_in_equal_steps(folders, kind, monkeypatch):
    seen = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        batches = list(module(dataset=kind, train_dir=folders[kind], batch_size=2).train_dataloader())
        assert [len(batch[0]) for batch in batches] == [2] * 5
        seen.append({image.sum().item() for batch in batches for image in batch[0]})
    assert not seen[0] & seen[1] if kind == "flat" else seen[0] != seen[1]


def test_batches_become_unit_range_floats_after_the_transfer():
    data = module(batch_size=8)
    images, labels = batch = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 8, 8) and labels.dtype == torch.int64
    moved, kept = data.on_after_batch_transfer(batch, 0)
    assert moved.dtype == torch.float32 and moved.is_contiguous() and torch.equal(kept, labels)
    torch.testing.assert_close(moved, images.float() / 127.5 - 1)
    empty, _ = data.on_after_batch_transfer([images[:0], labels[:0]], 0)
    assert empty.shape == (0, 3, 8, 8) and empty.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("kind,workers", [("flat", 0), ("flat", 2), ("webdataset", 0), ("webdataset", 2), ("fake", 2)])
def test_a_restored_loader_gives_the_same_next_batches(folders, kind, workers):
    settings = {"dataset": kind, "train_dir": folders.get(kind), "num_workers": workers, "dataset_size": 21}
    loader = module(**settings).train_dataloader()
    states, batches = [], []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
    assert len(batches) == 10 and len(loader) == 5
    assert not torch.equal(batches[0][0], batches[5][0])  # epochs differ
    for k in (0, 2, 4, 6, 8):
        restored = module(**settings).train_dataloader()
        restored.load_state_dict(states[k])
        assert restored.state_dict() == states[k]  # saved again before any batch
        same(list(restored) + (list(restored) if k < 4 else []), batches[k + 1 : 10])


def test_a_small_folder_gives_an_epoch_of_the_size_that_is_asked_for(folders):
    settings = {"dataset": "flat", "train_dir": folders["flat"], "dataset_size": 84, "batch_size": 21}
    loader = module(**settings).train_dataloader()
    states, batches = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert len(batches) == len(loader) == 4
    sums = [sorted(batch[0].float().mean((1, 2, 3)).tolist()) for batch in batches]
    assert all(a != b for a, b in itertools.pairwise(sums))  # the same images, in other crops
    restored = module(**settings).train_dataloader()
    restored.load_state_dict(states[1])
    same(list(restored), batches[2:])


def test_a_resume_does_not_depend_on_the_number_of_workers_or_ranks(folders, monkeypatch, caplog):
    loader = module(dataset="flat", train_dir=folders["flat"], batch_size=2, num_workers=0).train_dataloader()
    batches = list(loader)
    loader = module(dataset="flat", train_dir=folders["flat"], batch_size=2, num_workers=0).train_dataloader()
    running = iter(loader)
    for _ in range(4):
        next(running)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        other = module(dataset="flat", train_dir=folders["flat"], batch_size=2, num_workers=2).train_dataloader()
        other.load_state_dict(loader.state_dict())
        same(list(other), batches[4 + rank :: 2])
    assert "webdataset" not in caplog.text


def test_a_change_of_workers_is_said_where_the_order_depends_on_it(folders, caplog):
    settings = {"dataset": "webdataset", "train_dir": folders["webdataset"]}
    state = module(**settings, num_workers=0).train_dataloader().state_dict()
    module(**settings, num_workers=2).train_dataloader().load_state_dict(state)
    assert naming("webdataset", 1, 2).search(caplog.text)


def test_the_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(module().train_dataloader())
    list(module(num_workers=1).val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


class SaveEverywhere(pl.Callback):
    """Checkpoints at each moment at which Lightning's ModelCheckpoint can make one."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, when):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / when / f"{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "step")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "val")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")


class Recorder(pl.LightningModule):
    """Remembers a fingerprint of each training batch, as the step sees it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def fingerprint(self, batch):
        images, _ = batch
        assert images.dtype == torch.float32 and images.abs().max() <= 1
        weights = torch.arange(images.numel(), dtype=torch.float64).sin().reshape(images.shape)
        return self.current_epoch, round((images * weights).sum().item(), 6)

    def training_step(self, batch, _):
        self.seen.append(self.fingerprint(batch))
        return self.weight * 0

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, folder, ckpt_path=None, callbacks=(), recorder=None, **options):
    recorder = recorder or Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            num_sanity_val_steps=0,
            max_epochs=3,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            **options,
        )
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


@pytest.mark.parametrize("kind,workers", [("flat", 0), ("flat", 2), ("webdataset", 2)])
@pytest.mark.parametrize("limit", [None, 3])
def test_lightning_resumes_exactly_from_any_of_its_checkpoints(folders, tmp_path, kind, workers, limit):
    def data():
        return module(dataset=kind, train_dir=folders[kind], val_dir=folders[kind], num_workers=workers)

    options = {"limit_train_batches": limit} if limit else {}
    per_epoch = limit or 5
    whole = fit(data(), tmp_path, callbacks=[SaveEverywhere(tmp_path)], **options)
    assert len(whole) == 3 * per_epoch == len(set(whole))
    steps = [1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch] if workers == 0 else [per_epoch + 1]
    checkpoints = [("step", step) for step in steps]
    checkpoints += [(when, per_epoch * e) for when in ("epoch", "val") for e in (1, 2)]
    for when, step in checkpoints if workers == 0 else checkpoints[::2]:
        rest = fit(data(), tmp_path, ckpt_path=tmp_path / when / f"{step}.ckpt", **options)
        assert rest == whole[step:], (when, step)


class TwoRanks(Recorder):
    """Writes what each rank saw, since forked ranks cannot hand it back, and counts validation images over both."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save((self.seen, self.val_sizes, self.total.item()), self.folder / f"{self.global_rank}.pt")

    def on_validation_epoch_start(self):
        self.val_sizes, self.total = [], torch.zeros(())

    def validation_step(self, batch, _):
        self.val_sizes.append(len(batch[0]))
        size = torch.tensor(float(len(batch[0])))
        torch.distributed.all_reduce(size)  # hangs if one rank makes fewer steps
        self.total += size


@pytest.mark.parametrize("kind", ["flat", "webdataset"])
def test_two_processes_resume_from_rank_0s_state_and_validate_every_image(folders, tmp_path, kind):
    def fit_two(name, ckpt_path=None):
        folder = tmp_path / name
        folder.mkdir()
        data = module(dataset=kind, train_dir=folders[kind], val_dir=folders[kind], batch_size=5, num_workers=1)
        fit(data, folder, ckpt_path, [SaveEverywhere(folder)], TwoRanks(folder), strategy="ddp_fork", devices=2)
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    whole = fit_two("whole")
    assert len(whole[0][0]) == 6 and not set(whole[0][0]) & set(whole[1][0])
    assert [(sum(sizes), total) for _, sizes, total in whole] == [(11, 21.0), (10, 21.0)]
    assert [sizes for _, sizes, _ in whole] == [[5, 5, 1], [5, 5, 0]]
    rest = fit_two("rest", tmp_path / "whole" / "step" / "3.ckpt")
    for rank in range(2):
        assert rest[rank][0] == whole[rank][0][3:]


# ------------------------------------------------------------------------------------------------- settings and counts


def test_no_val_dir_means_no_validation(folders, caplog):
    data = module(dataset="flat", train_dir=folders["flat"])
    with caplog.at_level(logging.INFO):
        assert data.val_dataloader() == [] and not data.has_val
    assert len(caplog.records) == 1 and naming("val_dir").search(caplog.text)
    assert module(dataset="flat", train_dir=folders["flat"], val_dir=folders["flat"]).has_val
    assert module(dataset="fake").has_val


def test_counts(folders, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i) if i != 4 else b"damaged")
    data = module(dataset="flat", train_dir=folders["flat"], val_dir=tmp_path, num_workers=2)
    batches = list(data.val_dataloader())
    assert [len(batch[0]) for batch in batches] == [4, 1]
    every = ("train", "val", "test")
    assert [data.samples(split) for split in every] == [21, 6, None]
    assert (data.skipped, data.workers) == (1, 2)
    places = {"train_dir": folders["webdataset"], "val_dir": folders["webdataset"]}
    shards = module(dataset="webdataset", splits=every, **places)
    assert [shards.samples(split) for split in every] == [21, 21, 21]
    fake = module(splits=every)
    assert [fake.samples(split) for split in every] == [512, 64, 64]


def test_a_single_rank_never_sees_an_empty_batch(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"damaged" if i in (2, 3) else image_bytes(i))
    for workers in (0, 1):
        batches = list(module(dataset="flat", val_dir=tmp_path, batch_size=2, num_workers=workers).val_dataloader())
        assert [len(batch[0]) for batch in batches] == [2, 2]


def test_test_falls_back_to_val(folders, caplog):
    with caplog.at_level(logging.INFO):
        data = module(dataset="flat", val_dir=folders["flat"], splits=["test"])
    assert sum(len(batch[0]) for batch in data.test_dataloader()) == 21
    assert naming("test_dir", "val_dir", folders["flat"]).search(caplog.text)


@pytest.mark.parametrize("kind", ["flat", "webdataset", "fake"])
def test_fewer_samples_than_a_batch(folders, kind, monkeypatch):
    data = module(dataset=kind, train_dir=folders.get(kind), dataset_size=21, batch_size=16)
    assert len(data.train_dataloader()) == 1
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(DataError, match=naming(21, "batch_size 16", "2 processes", 32, 10, "raise dataset_size")):
        data.train_dataloader()


def test_bad_settings_are_named(folders, tmp_path):
    with pytest.raises(DataError, match=naming("dataset", None, "imagefolder", "flat", "webdataset", "fake")):
        module(dataset=None)
    with pytest.raises(DataError, match=naming("--train_dir", "--fake_data")):
        module(dataset="flat", splits=["train", "val"])
    with pytest.raises(DataError, match=naming("--test_dir", "--fake_data")):
        module(dataset="flat", splits=["test"])
    with pytest.raises(DataError, match=naming("val_dir", tmp_path / "nowhere")):
        module(dataset="flat", train_dir=folders["flat"], val_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=naming("val_dir", tmp_path, ".tar")):
        module(dataset="webdataset", val_dir=tmp_path)
    with pytest.raises(DataError, match=naming("--dataset_size")):
        module(dataset="webdataset", train_dir="http://localhost/{0..3}.tar").train_dataloader()
    remote = module(dataset="webdataset", val_dir="http://localhost/{0..3}.tar").val_dataloader()
    with pytest.raises(TypeError, match=naming("remote shards")):
        len(remote)
