"""What a message has to name: the settings, files and values in it, whatever its sentence."""

from __future__ import annotations

import re


def naming(*facts: object) -> re.Pattern[str]:
    """A pattern that finds all these names and values, each as a whole word, in any order.

    For `pytest.raises(ConfigError, match=naming("top_k", "temperature", 0))` and `naming("seed", 3).search(said)`.
    """
    ahead = (rf"(?=.*(?<!\w){re.escape(str(fact))}(?!\w))" for fact in facts)
    return re.compile(rf"\A{''.join(ahead)}", re.DOTALL)
