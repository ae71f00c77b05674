"""Whatever users give is accepted or refused in one line, within limits; see the package's docstring."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.fuzz.cases import VALID_EVERY, areas
from tests.fuzz.client import Servers

AREAS = areas()
SMOKE = {"flags": 7, "yaml": 5, "images": 2, "folders": 2, "tars": 2, "captions": 2}
FINE = ("accepted", "refused")
SHOWN = 20  # failed cases in a message


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One server for each of two processors."""
    with Servers(tmp_path_factory.mktemp("fuzz"), min(2, os.cpu_count() or 1)) as started:
        yield started


def run(servers: Servers, area: str, count: int) -> Counter[str]:
    """How `count` cases of an area ended, of which none may have ended badly."""
    ended, failed = Counter(), []
    for seed, answer in servers.run(area, range(count)):
        ended[answer["ended"]] += 1
        if answer["ended"] not in FINE:
            failed.append((seed, answer))
    again = f"python -m tests.fuzz --folder {servers.folder} {area}"
    messages = [
        f"{it['ended']}: {it['why']}\n  changed: {it['changed']}\n  again: {again} {seed}\n"
        + "\n".join(f"    {line}" for line in it.get("printed", "").splitlines()[-12:])
        for seed, it in sorted(failed, key=lambda one: one[0])
    ]
    assert not failed, f"{len(failed)} of {count} cases of {area}: {dict(ended)}\n" + "\n".join(messages[:SHOWN])
    assert ended["accepted"] >= -(-count // VALID_EVERY), f"hardly any case of {area} is accepted: {dict(ended)}"
    return ended


@pytest.mark.slow
def test_a_few_cases(servers):
    assert sum(sum(run(servers, area, count).values()) for area, count in SMOKE.items()) == 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("area", AREAS)
def test_many_cases(servers, area, record_property):
    cases = int(os.environ.get("FUZZ_CASES", AREAS[area].cases))
    ended = run(servers, area, cases)
    record_property("accepted", ended["accepted"])
    assert ended["refused"], f"no case of {area} is refused: {dict(ended)}"
