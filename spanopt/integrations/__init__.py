"""Callbacks for training frameworks. Import the module of a framework, which must be installed.

Accelerate needs no callback: prepare a :class:`~spanopt.SpanScaledOptimizer` like any optimizer.
"""
