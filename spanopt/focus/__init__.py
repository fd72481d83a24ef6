"""Semantic focus changes the forward pass: attention to chosen keys only, in a model as it is.

Nothing else in this library changes what a model computes. This module is never part of the
optimizer wrapper, and is on only inside ``with focus(model, ...)`` or until ``remove()``.
"""

from spanopt.focus.attention import focused_attention
from spanopt.focus.hooks import FocusHooks, UnfocusedLayerError, focus
from spanopt.focus.spec import KINDS, Focus

__all__ = ["KINDS", "Focus", "FocusHooks", "UnfocusedLayerError", "focus", "focused_attention"]
