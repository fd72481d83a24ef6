"""Taps: how the nodes reach Q and K. One file per way; each lists the functions it handles."""

from spanopt.taps import packed, score, softmax
from spanopt.taps.tap import Handler

HANDLERS: dict[str, Handler] = {**score.HANDLERS, **packed.HANDLERS, **softmax.HANDLERS}
