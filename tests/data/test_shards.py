"""Tar shards: found or refused, read over ranks x workers with every sample counted, damaged ones passed over."""

import functools
import http.server
import random
import tarfile
import threading
from collections import Counter, deque

import numpy as np
import pytest
import torch
import webdataset

from latent_verse.data import DataError, EvalShards, Shards, TrainShards
from latent_verse.data.images import SkipLog
from latent_verse.data.shard_names import find_shards
from latent_verse.data.shards import read_shards
from tests.messages import naming
from tests.shard_files import evaluate, flat, image_bytes, labels, loader, run, train, write_shards, write_tar

# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("sizes", [[7, 3, 5, 4, 6], [9], [2, 1], [1]])
@pytest.mark.parametrize("world,workers", [(1, 0), (1, 2), (2, 2), (3, 0)])
def test_evaluation_sees_each_sample_once_in_equal_steps(tmp_path, sizes, world, workers):
    shards = write_shards(tmp_path, sizes)
    ranks = []
    for rank in range(world):
        dataset = evaluate(shards, 2, rank, world)
        ranks.append(labels(loader(dataset, workers)))
        assert dataset.steps(workers) == len(ranks[-1])
    assert sorted(flat(batch for rank in ranks for batch in rank)) == list(range(sum(sizes)))
    assert len({len(rank) for rank in ranks}) == 1
    if world == 1:
        assert all(ranks[0])


def test_samples_are_images_with_labels(tmp_path):
    shards = write_shards(tmp_path / "a", [3])
    write_tar(
        tmp_path / "b.tar",
        [("x.jpg", image_bytes(0)), ("y.jpg", image_bytes(1)), ("y.cls", b"cat"), ("z.txt", b"no image")],
    )
    for i, (image, label) in enumerate(evaluate(shards)):
        assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and label == i
        expected = np.random.default_rng(i).integers(0, 255, 3)
        np.testing.assert_allclose(image.float().mean((1, 2)), expected, atol=6)
    assert [label for _, label in evaluate(tmp_path / "b.tar")] == [-1, -1]


# ------------------------------------------------------------------------------------------------------------ training


def test_training_over_two_ranks_with_two_workers(tmp_path):
    shards = write_shards(tmp_path, [6] * 8)  # 48 samples, 4 slots with 2 shards each
    ranks = [run(train(shards, steps=12, world=2, rank=rank), 2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [12, 12]
    assert all(len(batch) == 2 for rank in ranks for batch in rank)
    # shards of equal size and an epoch of their length: nothing is lost and nothing comes twice
    assert sorted(flat(ranks[0]) + flat(ranks[1])) == list(range(48))
    assert flat(ranks[0]) != sorted(flat(ranks[0]))
    again = [run(train(shards, steps=12, world=2, rank=rank), 2) for rank in range(2)]
    assert again == ranks
    epochs = [flat(run(train(shards, steps=12, world=2, rank=0), 2, epoch)) for epoch in range(3)]
    assert sorted(epochs[0]) != sorted(epochs[1])  # other shards, not only another order
    assert epochs[1] != epochs[2]
    assert run(train(shards, steps=12, seed=1), 0) != run(train(shards, steps=12, seed=0), 0)


@pytest.mark.parametrize("sizes", [[5], [3, 4]])
def test_fewer_shards_than_ranks_and_workers_still_train(tmp_path, sizes):
    shards = write_shards(tmp_path, sizes)
    ranks = [run(train(shards, steps=5, world=2, rank=rank), 2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [5, 5]
    assert ranks[0] != ranks[1]
    assert set(flat(ranks[0]) + flat(ranks[1])) <= set(range(sum(sizes)))


def test_an_epoch_may_be_longer_than_the_data(tmp_path):
    shards = write_shards(tmp_path, [3, 2])
    counts = Counter(flat(run(train(shards, steps=10), 0)))
    assert sum(counts.values()) == 20 and set(counts) == set(range(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_continues_at_any_batch(tmp_path, workers):
    shards = write_shards(tmp_path, [5, 6, 7])
    dataset = train(shards, steps=7)
    for epoch in (0, 1):
        dataset.start_at(epoch, 0)
        whole = [image for image, _ in loader(dataset, workers)]
        for first in (1, 3, 6) if workers else range(7):
            dataset.start_at(epoch, first)
            rest = [image for image, _ in loader(dataset, workers)]
            assert len(rest) == 7 - first
            assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))


# ------------------------------------------------------------------------------------------------------------- damaged


@pytest.fixture
def damaged(tmp_path):
    """One shard of ten samples, 3, 4 and 9 of them unreadable."""
    bad = {3: b"", 4: image_bytes(4)[:200], 9: b"not an image"}
    members = []
    for i in range(10):
        members += [(f"{i}.jpg", bad.get(i, image_bytes(i))), (f"{i}.cls", str(i).encode())]
    write_tar(tmp_path / "bad.tar", members)
    return [str(tmp_path / "bad.tar")]


def test_evaluation_drops_unreadable_members(damaged, caplog):
    for workers in (0, 2):
        dataset = evaluate(damaged)
        assert sorted(flat(labels(loader(dataset, workers)))) == [0, 1, 2, 5, 6, 7, 8]
        assert dataset.source.skipped.count == 3  # made in a worker, seen here
    assert naming(9, damaged[0]).search(caplog.text)
    # dropped ones count for the steps, so ranks stay together
    lengths = {len(labels(loader(evaluate(damaged, 2, rank, 2), 0))) for rank in range(2)}
    assert lengths == {3}


def test_training_replaces_them_and_still_resumes(damaged):
    dataset = train(damaged, steps=10)
    whole = run(dataset, 0)
    assert [len(batch) for batch in whole] == [2] * 10
    assert set(flat(whole)) == {0, 1, 2, 5, 6, 7, 8}
    assert dataset.source.skipped.count == 3
    for first in range(10):
        assert run(dataset, 0, first=first) == whole[first:]


def test_a_broken_off_shard_is_counted_and_the_next_one_read(tmp_path, caplog):
    shards = write_shards(tmp_path, [6, 2])
    with tarfile.open(shards[0]) as tar:
        cut = tar.getmembers()[6].offset_data + 20  # within the fourth image
    with open(shards[0], "r+b") as file:
        file.truncate(cut)
    dataset = evaluate(shards)
    seen = flat(labels(loader(dataset, 0)))
    assert seen == [0, 1, 2, 6, 7]
    assert dataset.source.skipped.count == 1 and naming("part", shards[0]).search(caplog.text)
    assert len(seen) <= dataset.steps(0) * 2


def test_shards_without_content_are_errors(tmp_path):
    (tmp_path / "no.tar").write_bytes(b"this is no tar file" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("no.tar", "empty.tar"):
        for dataset in (evaluate, train):
            with pytest.raises(DataError, match=naming("train_dir", tmp_path / name)):
                list(dataset(tmp_path / name))
    gone = evaluate(write_shards(tmp_path / "gone", [2]))
    (tmp_path / "gone" / "000.tar").unlink()
    with pytest.raises(DataError, match=naming(tmp_path / "gone" / "000.tar")):
        list(loader(gone, 1))  # the error comes out of the worker process


@pytest.mark.parametrize(
    ("members", "facts"),
    [
        ([("a.txt", b"x"), ("b.txt", b"y")], ["2 .txt"]),
        ([("a.b.jpg", b"x"), ("c.d.jpg", b"x"), ("a.b.txt", b"x")], ["1 .d.jpg", "1 .b.jpg", "first dot"]),
        ([("._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), ("noname", b"x")], ["1 without an extension"]),
        ([], ["no file at all"]),
    ],
)
def test_shards_without_images_are_refused_by_whatever_reads_them(tmp_path, members, facts):
    """One error that names the shard, what is in it and the rule, even where other shards hold images."""
    shards = write_shards(tmp_path, [3])
    write_tar(tmp_path / "bare.tar", members)
    rule = naming(tmp_path / "bare.tar", *facts, "jpg, jpeg, png, webp, bmp")
    for source in ([str(tmp_path / "bare.tar")], [*shards, str(tmp_path / "bare.tar")]):
        for read in (list, lambda dataset: dataset.source.samples, lambda dataset: dataset.steps(2)):
            with pytest.raises(DataError, match=rule):
                read(evaluate(source))
    with pytest.raises(DataError, match=rule):
        list(train(tmp_path / "bare.tar"))


def test_members_are_never_unpickled(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", image_bytes(0)), ("0.pyd", b"cos\nabort\n."), ("0.pkl", b"cos\nabort\n.")])
    assert len(list(evaluate(tmp_path / "a.tar"))) == 1


def test_what_waits_to_be_shuffled_is_bounded_in_bytes(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [40])
    usual = flat(run(train(shards, steps=40, buffer=1000), 0))
    monkeypatch.setattr("latent_verse.data.shards.BUFFER_BYTES", 10 * len(image_bytes(0)))
    raws = train(shards, steps=40, buffer=1000)._shuffled(0, 0, 1)
    bounded = [int(next(raws)["cls"]) for _ in range(80)]
    assert sorted(bounded[:40]) == sorted(bounded[40:]) == list(range(40))
    assert max(abs(i - label) for i, label in enumerate(bounded[:40])) < 30
    assert sorted(usual[:40]) == list(range(40)) and max(abs(i - label) for i, label in enumerate(usual[:40])) >= 30


def test_unreadable_samples_that_wait_for_their_turn_hold_no_bytes(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"no image" * 1000 if i else image_bytes(0)) for i in range(9)])
    dataset = train(tmp_path / "a.tar", steps=4)
    ahead = deque()
    raws = read_shards([str(tmp_path / "a.tar")], SkipLog(1))
    next(raws)
    with pytest.raises(StopIteration):
        dataset._readable(raws, ahead)
    assert [raw["jpg"] for raw in ahead] == [b""] * 8 and dataset.source.skipped.count == 8


@pytest.mark.parametrize("label", [b"9" * 30, b"-" + b"9" * 30, b"9223372036854775808", b"9" * 5000])
def test_labels_that_no_tensor_can_hold_are_none(tmp_path, label):
    write_tar(
        tmp_path / "a.tar", [("0.jpg", image_bytes(0)), ("0.cls", label), ("1.jpg", image_bytes(1)), ("1.cls", b"7")]
    )
    assert labels(loader(evaluate(tmp_path / "a.tar"), 0)) == [[-1, 7]]


# -------------------------------------------------------------------------------------------------------------- remote


def test_pipe_urls(tmp_path):
    write_shards(tmp_path, [4, 3])
    shards = find_shards(f"pipe:cat {tmp_path}/{{000,001}}.tar", allow_pipe=True)
    dataset = EvalShards(Shards(shards, 8, allow_pipe=True), 2)
    assert sorted(flat(labels(loader(dataset, 2)))) == list(range(7))
    assert dataset.steps(2) is None
    assert len(flat(run(TrainShards(Shards(shards, 8, allow_pipe=True), 6, 2), 2))) == 12
    with pytest.raises(DataError, match=naming("pipe:cat /nowhere.tar 2>/dev/null")):
        list(EvalShards(Shards("pipe:cat /nowhere.tar 2>/dev/null", 8, allow_pipe=True), 2))


def test_http_urls(tmp_path):
    write_shards(tmp_path, [4, 3])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        shards = find_shards(f"{url}/{{000..001}}.tar")
        assert flat(labels(loader(evaluate(shards), 0))) == list(range(7))
        with pytest.raises(DataError, match=naming(f"{url}/nowhere.tar", "exit code 22")) as caught:  # curl's for a 404
            list(evaluate(f"{url}/nowhere.tar"))
        assert "--retry" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------ what webdataset does without saying so


def test_the_shuffle_on_which_the_exact_resume_rests_is_as_it_was():
    """Another order in a new version of webdataset would resume old runs with other samples."""
    order = list(webdataset.shuffle(4, rng=random.Random(0))(iter(range(12))))
    assert order == [3, 4, 0, 2, 7, 8, 6, 10, 9, 11, 5, 1]


def test_a_pipe_that_is_closed_before_its_end_is_no_broken_shard(tmp_path):
    """Its exit status is read off `status`, which webdataset does not document."""
    (shard,) = write_shards(tmp_path, [3])
    with open(shard, "ab") as file:
        file.write(bytes(1 << 20))  # more than a pipe holds, after the end of the archive
    dataset = EvalShards(Shards(f"pipe:cat {shard}", 8, allow_pipe=True), 1)
    assert len(list(dataset)) == 3 and dataset.source.skipped.count == 0
