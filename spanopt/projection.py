"""Projection onto the span of a query or key matrix: the public face of the mathematics."""

from __future__ import annotations

from spanopt.mathematics.parts import decompose, orthonormal, project
from spanopt.mathematics.precision import default_ridge
from spanopt.mathematics.rescaled import rescale, rescale_by_document

__all__ = [
    "decompose",
    "default_ridge",
    "orthonormal",
    "project",
    "rescale",
    "rescale_by_document",
]
