"""Span-scaled attention gradients for any PyTorch optimizer and any transformer."""

from spanopt.errors import UnscaledLayerError
from spanopt.groups import SpanGroup
from spanopt.hooks import SpanHooks
from spanopt.installing import attach
from spanopt.monitor import SpanMonitor
from spanopt.node import span_node
from spanopt.optimizer import SpanScaledOptimizer
from spanopt.projection import decompose, project, rescale
from spanopt.scale import SpanScale
from spanopt.scheduler import SpanScheduler
from spanopt.schedules import chained, constant, cosine, linear, piecewise
from spanopt.sites import AttentionSite, find_attention
from spanopt.tokens import token_mask

__all__ = [
    "AttentionSite",
    "SpanGroup",
    "SpanHooks",
    "SpanMonitor",
    "SpanScale",
    "SpanScaledOptimizer",
    "SpanScheduler",
    "UnscaledLayerError",
    "attach",
    "chained",
    "constant",
    "cosine",
    "decompose",
    "find_attention",
    "linear",
    "piecewise",
    "project",
    "rescale",
    "span_node",
    "token_mask",
]
__version__ = "0.2.0"
