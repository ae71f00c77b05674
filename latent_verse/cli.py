"""The old name of `latent_verse.config.cli`, with the old form of `one_line_errors`."""

import contextlib
import sys

from latent_verse.config.cli import *  # noqa: F403
from latent_verse.config.settings import ConfigError


@contextlib.contextmanager
def errors_to_exit_code(*kinds: type[BaseException]):
    """Print mistakes of the user (ConfigError and `kinds`) as one line on stderr, not as a traceback.

    Yields a list that is empty, or holds the exit code 2 after such an error.
    """
    codes: list[int] = []
    try:
        yield codes
    except (ConfigError, *kinds) as error:
        print(f"error: {error}", file=sys.stderr)
        codes.append(2)
