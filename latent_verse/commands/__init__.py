"""The programs. Until one listens to signals itself, which its imports delay, Ctrl-C ends it without a traceback."""

import os
import signal
import sys

SCRIPTS = ("train_vae.py", "eval_vae.py", "train_biart.py", "eval_biart.py", "generate.py", "latent-verse")

_folder, _name = os.path.split(sys.argv[0] if sys.argv else "")
_is_program = _name in SCRIPTS or os.path.basename(_folder) == "latent_verse"  # python -m latent_verse
if _is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if ignored, as by nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)
