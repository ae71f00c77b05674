"""A fuzz of everything that users give: flags, YAML, images, folders, tars, captions, checkpoints, bundles, runs.

It mirrors no room of the library. A case is made from (area, seed) alone: a valid input with one or a few changes,
given to a real entry point (a command's `main`, or a public loader). Whatever is given, it has to be accepted, or
refused in one line: no traceback, no hang, no crash, bounded memory, nothing written elsewhere or into the inputs, no
program started, no connection made. One case in ten is left unchanged and has to be accepted.

    cases.py       Case, Area and the table AREAS
    mutations.py   changes to bytes, texts and trees
    valid.py       the valid inputs, made once
    settings.py    areas flags and yaml
    data.py        areas images, folders, tars and captions
    models.py      areas checkpoints, bundles, runs and codes
    commands.py    areas outputs and commands
    server.py      a warm process that forks one process for each case, with limits, and says how it ended
    __main__.py    python -m tests.fuzz AREA SEED: one case again, and all it printed

FUZZ_CASES=10000 python -m pytest -m slow tests/fuzz runs that many cases of each area.
"""
