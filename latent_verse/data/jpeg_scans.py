"""Whether the scans of a JPEG are whole: where data are missing, decoders fill the rest with gray and report nothing.

Nothing is decoded here: a look at the markers costs about 2 % of decoding. What it cannot find is damage that leaves
bytes of pixels, flipped bits for example: the pixels after it are wrong, and no checksum in the format would say so.

Source: ITU-T T.81, sections B.1 (markers), B.2.3 (scans) and G.1.1.1 (progressive scans).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_MARKER = re.compile(rb"\xff[^\x00\xff]")  # in pixels, \xff is followed by \x00; a marker may be preceded by more \xff
SOS, DRI, EOI, RST0 = 0xDA, 0xDD, 0xD9, 0xD0
RESTARTS = range(RST0, RST0 + 8)
WITHOUT_LENGTH = (0x01, 0xD8, *RESTARTS)
PROGRESSIVE = (0xC2, 0xCA)
ARITHMETIC = (0xC9, 0xCA)
FRAMES = (0xC0, 0xC1, *PROGRESSIVE, 0xC9)
# what may come after a scan: tables, the number of lines, the next scan, the end, metadata
AFTER_SCAN = (0xC4, 0xCC, 0xDB, 0xDC, DRI, SOS, EOI, *range(0xE0, 0xF0), 0xFE)
GRAY = (127, 128)  # every channel of a pixel of which there are no data; CMYK is inverted
END = bytes((0xFF, EOI))
MAX_SCANS = 100  # photos have about ten; each costs a pass over all pixels, and a few kilobytes can ask for thousands
PER_BYTE = 512  # values at most: each block of 8 x 8 takes at least a bit, unless the codes are arithmetic
MAX_COEFFICIENTS = 400_000_000  # of a progressive JPEG: all of them are in memory, two bytes each
MAX_ZEROS = 8  # with which the pixels of a whole file may end
MORE = bytes(value * 89 % 255 for value in range(1, 256))  # as data of pixels, they mean more than gray


class Scans(NamedTuple):
    """What the markers say of the scans."""

    end: int  # where the data of the last scan end
    doubtful: bool  # whether they end as no encoder ends them; they may be whole nevertheless
    damage: str = ""  # what is wrong for certain


def read_scans(data: bytes) -> Scans:
    """Look at all markers up to the end of the image; what follows it, as in photos of phones, does not matter."""
    at = end = interval = scans = 0
    progressive = False
    unfinished: dict[int, int] = {}  # progressive: of each component, the coefficients whose last bits are to come
    while found := _MARKER.search(data, at):
        kind, at = data[found.start() + 1], found.end()
        if kind == EOI:
            cut = any(unfinished.values())
            # more bytes behind the end are common, but not behind a progressive scan: it may be its own
            doubtful = progressive and at < len(data)
            return Scans(end, doubtful, "it ends before all of its progressive scans have come" if cut else "")
        if kind in WITHOUT_LENGTH:
            continue
        body = data[at + 2 : at + int.from_bytes(data[at : at + 2], "big")]
        at += 2 + len(body)
        if kind in FRAMES and (damage := _too_much(kind, body, len(data))):
            return Scans(end, False, damage)
        if kind in PROGRESSIVE:
            progressive = True
        elif kind == DRI:
            interval = int.from_bytes(body[:2], "big")
        elif kind == SOS:
            scans += 1
            if scans > MAX_SCANS:
                return Scans(end, False, f"it has more than {MAX_SCANS} scans")
            if progressive and len(body) >= 4:
                first, last, bits = body[-3:]
                band = (2 << last) - (1 << first)
                for component in body[1:-3:2]:
                    known = unfinished.get(component, 0)
                    unfinished[component] = known | band if bits & 15 else known & ~band
            for restarts, found in enumerate(_MARKER.finditer(data, at)):
                kind = data[found.start() + 1]
                if kind not in RESTARTS or not interval:
                    break
                if kind != RST0 + restarts % 8:
                    return Scans(found.start(), True, f"its restart marker {restarts} is missing or damaged")
            else:
                kept = len(data.rstrip(b"\0\xff"))  # zeros: what was never written, or filled up; a few are pixels
                return Scans(kept if data.count(b"\0", kept) >= MAX_ZEROS else len(data), True)
            at = found.start()
            end = at
            while data[end - 1] == 0xFF:  # fill bytes before the marker
                end -= 1
            if kind not in AFTER_SCAN:
                return Scans(end, True)
    return Scans(end, True)


def _too_much(kind: int, frame: bytes, size: int) -> str:
    """What is wrong with the frame header of a file of `size` bytes that declares more than it holds, or a lot."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    sides = [(code >> 4, code & 15) for code in frame[7::3]]  # how finely each component is sampled
    finest = max((h for h, _ in sides), default=0) * max((v for _, v in sides), default=0)
    values = width * height * sum(h * v for h, v in sides) // max(finest, 1)
    if kind not in ARITHMETIC and values > PER_BYTE * size:
        return f"its {size:,} bytes cannot hold {width} x {height} pixels"
    if kind in PROGRESSIVE and values > MAX_COEFFICIENTS:
        return f"its {width} x {height} pixels, progressive, take {values:,} numbers; at most {MAX_COEFFICIENTS:,}"
    return ""
