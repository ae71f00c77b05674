"""One or a few changes to valid bytes, texts and trees, so that what is changed still gets deep into a reader."""

from __future__ import annotations

import json
import random
import re
from typing import Any

# what texts rarely hold and readers often trip over
CHARACTERS = (
    *"\0\a\x1b\t\r\n\x0b\x0c\x1c\x85\x7f\"'`,;:#{}[]$%&*!|>@\\~-",
    *"\u00a0\u200b\u2028\u2029\u202e\ufeff\ufffd\ufffe\ue000\u0301é赤😀",
)
TEXTS = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1e400",
        "nan",
        "-inf",
        "0x10",
        "010",
        "1_000",
        "1:30",
        "true",
        "on",
        "no",
        "null",
        "~",
        "???",
    ),
    *("${x}", "${oc.env:HOME}", "%s%n", "{0}", "{}", "../../up", "/dev/null", "/proc/self/mem", "a/b", "pipe:echo x"),
    *(
        "http://127.0.0.1:9/x",
        "file:///etc/hostname",
        "s3://bucket/x",
        "--help",
        "-",
        "<script>",
        "\x1b[2J",
        "two\nlines",
    ),
    *("𝟙𝟚", "١٢", "é" * 300, "x" * 100_000, "2026-11-27", "1e5", "9" * 4400, "=1+1", "[1, 2]", '{"a": 1}'),
)
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e-320, 1e308, float("nan"), float("inf"), -0.5, 0.5, 65536)
DEEP = "deeply nested"  # stands for 100,000 brackets, which no writer writes

Tree = Any  # what JSON and YAML hold


class Mutator:
    """Makes changes with one source of randomness, and notes each of them in words."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        self.notes: list[str] = []

    def note(self, *words: object) -> None:
        self.notes.append(" ".join(_shortened(word) for word in words))

    def pick(self, options):
        """One of the options."""
        return self.rng.choice(list(options))

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def few(self) -> range:
        """Mostly one change, sometimes up to four."""
        return range(self.rng.choice((1, 1, 1, 2, 2, 4)))

    def some(self, options) -> list:
        """One or a few different options."""
        options = list(options)
        found = [self.rng.choice(options) for _ in self.few()]
        return [option for i, option in enumerate(found) if option not in found[:i]]

    def bytes(self, data: bytes, first: int = 0) -> bytes:
        """Flips, cuts, copies and extreme numbers, at `first` or later."""
        data = bytearray(data)
        for _ in self.few():
            at = self.rng.randrange(min(first, len(data)), len(data) + 1)
            if self.chance(0.3):  # headers are at the front
                at = min(first + int(self.rng.expovariate(1 / 40)), len(data))
            run = self.rng.choice((1, 2, 4, 8, 64, 1000))
            what = self.rng.choice(
                ("flip", "set", "number", "cut", "delete", "copy", "zero", "noise", "insert", "append")
            )
            if what == "flip" and at < len(data):
                data[at] ^= 1 << self.rng.randrange(8)
            elif what == "set" and at < len(data):
                data[at] = self.rng.choice((0, 1, 127, 128, 255, self.rng.randrange(256)))
            elif what == "number":
                width, order = self.rng.choice((2, 4, 8)), self.rng.choice(("little", "big"))
                value = self.rng.choice(
                    (0, 1, 255, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
                )
                data[at : at + width] = value.to_bytes(width, order)
            elif what == "cut":
                del data[at:]
            elif what == "delete":
                del data[at : at + run]
            elif what == "copy":
                data[at:at] = data[at : at + run] * self.rng.choice((1, 1, 50))
            elif what == "zero":
                data[at : at + run] = bytes(len(data[at : at + run]))
            elif what in ("noise", "insert"):
                data[at : at + (run if what == "noise" else 0)] = self.rng.randbytes(run)
            elif what == "append":
                data += self.rng.randbytes(run)
            self.note(what, "at byte", at)
        return bytes(data)

    def text(self, text: str) -> str:
        """Odd characters, cuts, copies, and numbers that become others."""
        for _ in self.few():
            at = self.rng.randrange(len(text) + 1)
            what = self.rng.choice(("character", "character", "cut", "delete", "copy", "number", "long", "odd", "line"))
            if what == "character":
                character = self.pick(CHARACTERS)
                text = text[:at] + character + text[at + self.rng.randrange(2) :]
                self.note("character", repr(character))
            elif what == "cut":
                text = text[:at]
            elif what == "delete":
                text = text[:at] + text[at + self.rng.choice((1, 5, 100)) :]
            elif what == "copy":
                text = text[:at] + text[at : at + self.rng.choice((1, 20, 200))] * 2 + text[at:]
            elif what == "number" and (found := list(re.finditer(r"-?\d+(\.\d+)?", text))):
                match, number = self.pick(found), str(self.pick(NUMBERS))
                text = text[: match.start()] + number + text[match.end() :]
                self.note("number", match[0], "->", number)
            elif what == "long":
                text = text[:at] + self.pick("x é,\n") * self.rng.choice((300, 100_000)) + text[at:]
            elif what == "odd":
                odd = self.pick(TEXTS)
                text = text[:at] + odd + text[at:]
                self.note("odd text", repr(odd))
            elif what == "line":
                lines = text.split("\n")
                lines.insert(self.rng.randrange(len(lines) + 1), self.pick(lines))
                text = self.rng.choice(("\n", "\n", "\r\n", "\r", "\n\n")).join(lines)
            self.note(what, "at character", at)
        return text

    def encoded(self, text: str) -> bytes:
        """As UTF-8, or, in one of five, with a byte order mark, in another encoding, or with a byte that is none."""
        plain = text.encode("utf-8", "surrogatepass")
        if not self.chance(0.2):
            return plain
        how = self.pick(("utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le", "damaged"))
        self.note("encoding", how)
        if how == "damaged":
            at = self.rng.randrange(len(plain) + 1)
            return plain[:at] + self.pick((b"\xff", b"\xe9", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88")) + plain[at:]
        return (text + "é").encode(how, "replace")

    def value(self, old: object = None) -> Tree:
        """Something else in the place of a value: another type, an extreme, or a little off."""
        if isinstance(old, (int, float)) and not isinstance(old, bool) and self.chance(0.3):
            return self.pick((old + 1, old - 1, -old, old * 1000, float(old), str(old), [old], old == 1))
        if isinstance(old, str) and self.chance(0.3):
            return self.text(old)
        kinds = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1, "a", None], DEEP)
        return self.pick((self.pick(NUMBERS), self.pick(TEXTS), self.pick(kinds)))

    def tree(self, tree: Tree) -> Tree:
        """A copy of the tree in which one or a few entries are changed, removed, renamed or there twice."""
        root = [_copied(tree)]
        for _ in self.few():
            places = list(_places(root, ()))
            container, key, path = self.pick(places if len(places) == 1 or self.chance(0.05) else places[1:])
            what = self.pick(("value", "value", "value", "remove", "add", "swap"))
            if what == "remove" and len(path):
                container.pop(key)
            elif what == "add" and isinstance(container, dict):
                name = self.pick((*TEXTS, f"{key} ", str(key).upper()))
                container[name] = self.value(container[key])
                self.note(repr(name), "as", repr(container[name])[:80])
            elif what == "add":
                container.insert(key, _copied(self.value(container[key]) if self.chance(0.5) else container[key]))
                self.note("entry", repr(container[key])[:80])
            elif what == "swap":
                other, its, _ = self.pick(places)
                container[key] = _copied(other[its])
            else:
                what, container[key] = "value", self.value(container[key])
                self.note(repr(container[key])[:80])
            self.note(what, "/".join(map(str, path)) or "all of it")
        return root[0]

    def json(self, tree: Tree) -> str:
        """The tree as JSON, which may hold what JSON does not: NaN, infinities, 100,000 brackets."""
        deep = self.pick(('{"a":', "[")) * 100_000
        return json.dumps(tree, ensure_ascii=self.chance(0.5), default=str).replace(json.dumps(DEEP), deep)

    def twice(self, text: str) -> str:
        """JSON in which one object gives a key twice, with the same value or another."""
        pairs = list(re.finditer(r'[{,] ?("[^"\\]*": ?(?:"[^"\\]*"|-?\d+|null))', text))
        if not pairs:
            return text
        found, other = self.pick(pairs), self.pick(pairs)
        key = found[1].partition(":")[0]
        self.note("twice:", key)
        return f"{text[: found.end()]}, {key}: {other[1].partition(':')[2]}{text[found.end() :]}"


def _copied(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _places(tree: Tree, path: tuple):
    """(container, key, path) of every entry below `tree`."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        here = (*path, key)
        yield tree, key, here[1:]
        if isinstance(value, (dict, list)):
            yield from _places(value, here)


def _shortened(word: object) -> str:
    text = str(word)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


# names that file systems allow, as bytes
ODD_NAMES = (
    *(
        b"._a.png",
        b".hidden.png",
        b"Thumbs.db",
        b".DS_Store",
        b"lat\xe9.jpg",
        b"\xff.txt",
        b"two\nlines.png",
        b"\x1b[2J.png",
    ),
    *(
        b" .png",
        b"a b.png",
        b"a,b.png",
        b"{a,b}.png",
        b"*.png",
        b"[a].png",
        b"~.png",
        b"~",
        b"$HOME.png",
        b"%s.png",
        b"-.png",
    ),
    *(b"a.b.c.png", b"A.PNG", b"a.JPEG", b".png", b"png", b"a.png.txt", b"a.txt.png", b"a.tar", b"x" * 251 + b".png"),
    *("größe.png".encode(), "赤.png".encode(), "a\u2028b.png".encode(), "a\u202eb.png".encode(), b"pipe:echo x.png"),
)
