"""The benchmark suite at toy sizes, through the code of the real ones: what it says is the same is the same.

Nothing here depends on how long something took.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import coco_sampling, measure, plain, plot, run
from benchmarks.biart import sequences_of
from benchmarks.measure import PeakBytes, Row, peer, race, row
from benchmarks.quantizer import agree
from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import EMAQuantizer
from latent_verse.biart.model import BiART
from latent_verse.config import BiARTConfig
from tests.messages import naming

SMALL = BiARTConfig(text_vocab=20, image_vocab=12, text_len=3, image_len=8, n_layer=2, n_head=2, n_embd=16)
COMPARED = {"quantizer", "augvae", "biart", "sampling", "data", "codes", "growth"}
TIMED_AT_ONCE = {"data", "startup", "growth"}  # areas of rows that wait for nothing that could fail


def rows_of(messages) -> dict[str, dict]:
    """case -> its row. No case may fail, and ours has to be there before any peer, a case's own failure excepted."""
    rows = {}
    for message in messages:
        assert "failed" not in message, message
        if "row" in message:
            new = json.loads(json.dumps(message["row"]))
            assert new["case"] in rows or new["ours"]
            assert new["case"] in rows or not new["peers"] or new["area"] in TIMED_AT_ONCE
            rows[new["case"]] = new
    return rows


@pytest.mark.parametrize("path", sorted(Path(run.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_from_the_library_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latent_verse"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name


@pytest.mark.parametrize("area", run.AREAS)
def test_each_area_runs_and_gives_the_same_as_the_plain_way(area):
    with torch.compiler.set_stance("force_eager"):  # of compiled ways, the slow test compiles
        rows = rows_of(run.measure(f"benchmarks.{area}", "cpu", "toy"))
    assert rows and all(r["area"] == area and r["ours"] for r in rows.values())
    assert not [case for case, r in rows.items() if r["same"] is False]
    assert area not in COMPARED or any(r["same"] for r in rows.values())
    cases = importlib.import_module(f"benchmarks.{area}").cases("cpu", "toy")
    assert [case.name for case in cases] == list(rows)  # failures are named as rows are
    assert all(case in "\n".join(run.table(r)) for case, r in rows.items())


@pytest.mark.slow
@pytest.mark.parametrize("area", run.COMPILED)
def test_compiled_ways_are_measured(area):
    rows = rows_of(run.measure(f"benchmarks.{area}", "cpu", "toy", compiled_only=True))
    assert rows and all("compiled" in case for case in rows)
    if area != "sampling":  # on a CPU no decoder is kept, so each call compiles
        assert all(r["figures"]["first_step_s"] > r["ours"]["seconds"] for r in rows.values())


@pytest.mark.parametrize("area", run.AREAS)
def test_each_area_has_cases_for_a_gpu(area):
    cases = importlib.import_module(f"benchmarks.{area}").cases("cuda", "cuda")
    names = [case.name for case in cases]
    assert names and len(set(names)) == len(names)
    compiled = [case.compiles for case in cases]
    assert any(compiled) == (area in run.COMPILED)
    assert not compiled[0]  # compiling takes long, so something is measured before it


def test_an_area_is_measured_in_a_child_process(tmp_path, capsys):
    file = tmp_path / "results" / "toy.json"
    assert run.main(["quantizer", "--size", "toy", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {"device", "packages", "commit", "python", "seconds"} <= content["about"].keys()
    assert content["about"]["packages"]["torch"]
    said = capsys.readouterr().out
    assert "QUANTIZER" in said and [row["case"] in said for row in content["rows"]] == [True, True]


def test_an_unknown_area_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["quantiser"])
    assert naming("quantiser", *run.AREAS).search(capsys.readouterr().err)


def test_an_absent_peer_is_named_in_the_table():
    entry = measure.absent("some-peer", ModuleNotFoundError("No module named 'some_peer'"))
    said = "\n".join(run.table(row("codes", "a case", {"seconds": 2.0, "bytes": 2**20}, [entry], unit="step")))
    assert "some-peer: absent, ModuleNotFoundError: No module named 'some_peer'" in said
    assert "2.00 s" in said and "1.0 MiB" in said


def test_a_goal_is_met_missed_or_not_known():
    rows = [row("codes", "a case", {"seconds": 2.0}, [], goal=">= 2x", met=met) for met in (True, False, None)]
    table = ["\n".join(run.table(r)) for r in rows]
    assert "met: >= 2x" in table[0] and "MISSED: >= 2x" in table[1] and "not known: >= 2x" in table[2]
    markdown = plot.markdown(rows)
    assert "| met: " in markdown[2] and "**missed**: " in markdown[3] and "not known: " in markdown[4]


def test_a_peer_that_fails_costs_its_own_entry():
    result = row("codes", "a case", {"seconds": 1.0, "bytes": 100}, [])

    def none_left():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    def ours():
        return torch.zeros(10)

    measure.against(result, "big", ours, none_left, "cpu", 1)
    entry = measure.against(result, "small", ours, lambda: ours, "cpu", 1, scale=2)
    assert naming("OutOfMemoryError", "8 GiB").search(result["peers"][0]["absent"])
    assert result["peers"][1] is entry and entry["bytes"] == 40 and entry["memory_ratio"] == pytest.approx(0.8)


def test_a_peer_is_timed_apart_where_memory_does_not_hold_both():
    result = row("codes", "a case", {"seconds": 1e-9, "bytes": None}, [])
    entry = measure.against(result, "it", lambda: pytest.fail("ours runs"), lambda: list, "cpu", 1, apart=True)
    assert entry["ratio"] == entry["seconds"] / 1e-9


@pytest.mark.parametrize(("seconds_each", "turns"), [(0.0, 30), (0.03, 4), (1.0, 3)])
def test_ways_take_turns_quick_ones_more_of_them(monkeypatch, seconds_each, turns):
    calls, clock = [], [0.0]

    def call(name):
        calls.append(name)
        clock[0] += seconds_each

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    times = race({"a": lambda: call("a"), "b": lambda: call("b")}, "cpu", repeats=3, warm=1)
    assert calls == ["a", "b"] * (1 + turns) and times.keys() == {"a", "b"}


def test_peak_bytes_counts_what_is_held_at_one_time():
    def run_():
        for _ in range(5):
            torch.zeros(1000) + 1  # 4,000 bytes twice, freed each time

    with PeakBytes() as count:
        run_()
    assert count.peak == 8000 and count.live == 0


def test_a_peer_says_how_many_times_ours_it_takes():
    entry: Row = peer("it", 2.0, 6.0, 100, 50)
    assert entry["ratio"] == 3 and entry["memory_ratio"] == 2


# ----------------------------------------------------------------------------------- the plain formulations are right


def test_the_one_hot_quantiser_is_ours(tiny_augvae):
    results = {}
    for variant in ("one-hot", "ours"):
        book = tiny_augvae().quantizer.embedding
        z_BDHW = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))
        learn = EMAQuantizer(book, plain.BETA).train()
        out = plain.one_hot_forward(book, z_BDHW) if variant == "one-hot" else learn(z_BDHW)
        results[variant] = {"indices": out[1].flatten(), "loss": out[2].item(), **book.state_dict()}
    assert agree(results["one-hot"], results["ours"]) == ""


def test_the_plain_augvae_is_ours_and_does_not_learn_in_evaluation(tiny_augvae, tiny_images):
    ours: AugVAE = tiny_augvae()
    other = plain.plain_augvae(ours).eval()
    for a, b in zip(ours(tiny_images()), other(tiny_images()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.quantizer.embedding.weight, other.quantizer.embedding.weight)
    ours.train()(tiny_images()), other.train()(tiny_images())
    torch.testing.assert_close(ours.quantizer.embedding.weight, other.quantizer.embedding.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["minGPT", "GPT-2"])
def test_the_peers_give_biarts_logits(network):
    torch.manual_seed(0)
    model = BiART(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        sequences = sequences_of(model, 4, "cpu")
        idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
        if network == "minGPT":
            logits = plain.MinGPT(model).eval()(idx_BT, seg_BT)
        else:
            pytest.importorskip("transformers")
            logits = plain.gpt2(model).eval()(inputs_embeds=plain.embeddings(model, idx_BT, seg_BT)).logits
        torch.testing.assert_close(logits, model(idx_BT, seg_BT), rtol=1e-4, atol=1e-4)


def test_plots_and_table_come_from_the_results(tmp_path, capsys):
    rows = [
        row(
            "quantizer",
            f"N {x}",
            {"seconds": x / 1e3, "bytes": x},
            [peer("one-hot", 1.0, 4.0, 8, 1)],
            goal=">= 3x",
            met=x > 1,
            law={"name": "quantiser: vectors", "series": "D = 8", "x": x},
        )
        for x in (1, 2, 4)
    ]
    content = {"about": {"device": "CPU, 1 threads of 2", "packages": {"torch": "2"}, "commit": "abc"}, "rows": rows}
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert plot.main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scaling_quantiser_cpu.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "| quantizer | N 1 | one-hot | 4.00x | 1/8.0 | **missed**: >= 3x |" in said and "met: >= 3x" in said


def test_the_sampling_of_cocos_protocol_is_extrapolated(tmp_path, capsys):
    flags = "--size tiny --captions 5 --candidates 2 --batch_size 3 --json".split()
    assert coco_sampling.main([*flags, str(tmp_path / "r.json")]) == 0
    out = json.loads((tmp_path / "r.json").read_text())
    assert out["pictures_per_second"] == pytest.approx(10 / out["seconds"]) and out["extrapolated"]
    assert out["hours_for_30000_captions"] == pytest.approx(out["seconds"] * 6000 / 3600)
    assert {"codes", "scores", "decoding"} < out["seconds_by_part"].keys() and min(out["seconds_by_part"].values()) > 0
    assert "extrapolated" in capsys.readouterr().out
