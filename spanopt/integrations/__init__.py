"""Callbacks for training frameworks, each imported by its own name and needing its framework.

Accelerate needs none: prepare a :class:`~spanopt.SpanScaledOptimizer` like any other optimizer.
"""
