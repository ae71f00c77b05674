"""What messages show: values and reasons of any size and kind in one short line that is safe to print."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from latent_verse.config.messages import differences, reason, shown


def doubled(levels: int) -> list:
    """Lists that share their items: 2**levels of them."""
    value: list = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_short_value_is_shown_as_python_writes_it():
    for value in (1, 1.5, None, True, "it's", b"a\n", [], (), {}, (1,), [1, (2, "a")], {"a": [None], 2: ()}, {3}):
        assert shown(value) == repr(value)


def test_a_value_of_any_size_is_shown_in_one_short_line():
    long = "a" * 10**6
    values = [long, [long], {long: 1}, [1] * 10**6, doubled(40), {"lr": doubled(40)}, OrderedDict(a=doubled(40))]
    for value in (*values, nested(100_000), 10**5000):
        itself = [value]
        itself.append(itself)
        for odd in (value, itself):
            assert len(shown(odd)) <= 83 and len(shown(odd, limit=10)) <= 13


def test_what_is_shown_is_safe_to_print():
    for odd in ("a\nb", "\x1b[2J", "\u202e", "\udcff", ["\x1b[2J"], Path("a\nb")):
        assert shown(odd).isprintable()


def test_reasons_are_one_bounded_line():
    assert reason(ValueError("\n  not  this\nCUDA kernel errors might be reported later")) == "not this"
    assert reason(FileNotFoundError(2, "No such file or directory", "/a")) == "No such file or directory"
    assert reason(TimeoutError()) == "TimeoutError"
    assert len(reason(ValueError("a" * 10**6))) <= 203
    assert reason(ValueError("\x1b[2J")).isprintable()


def test_differences_name_the_setting_and_both_values():
    old = {"lr": 0.1, "same": 1, "gone": 2}
    assert differences(old, {"lr": 0.2, "same": 1, "name": "a"}) == [
        "lr: 0.1 then, 0.2 now",
        "name: None then, 'a' now",
    ]
    assert differences(old, {"same": 1}) == []
    for large in ("a" * 100_000, doubled(60)):
        (line,) = differences({"lr": large}, {"lr": 1})
        assert len(line) < 400 and line.endswith(", 1 now")
