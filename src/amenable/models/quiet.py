"""Keeps the progress bars of libraries off the screen; ours say what matters."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def without_bars(*, swallow_stderr: bool = False) -> Iterator[None]:
    """Switches transformers' progress bars off inside the block.

    Args:
        swallow_stderr: drop whatever is written to stderr too, for bars that have no switch.
    """
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if swallow_stderr:
            with redirect_stderr(io.StringIO()):
                yield
        else:
            yield
    finally:
        if were_on:
            logging.enable_progress_bar()
