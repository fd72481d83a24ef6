"""Semantic focus: attention to chosen keys only, which changes the forward pass of a model.

Nothing else in this library changes what a model computes. The optimizer wrapper never uses focus.
It is on only inside ``with focus(model, ...)``, or until ``remove()``.
"""

from spanopt.focus.attention import focused_attention
from spanopt.focus.hooks import FocusHooks, UnfocusedLayerError, focus
from spanopt.focus.spec import KINDS, Focus

__all__ = ["KINDS", "Focus", "FocusHooks", "UnfocusedLayerError", "focus", "focused_attention"]
