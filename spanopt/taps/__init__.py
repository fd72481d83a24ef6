"""Taps: how the nodes reach Q and K. One file per way; each lists the functions it handles."""

from collections.abc import Callable
from typing import Any

from spanopt.taps import packed, score
from spanopt.taps.tap import Handler

HANDLERS: list[tuple[Callable[..., Any], Handler]] = [*score.HANDLERS, *packed.HANDLERS]
