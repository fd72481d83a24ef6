"""Projection onto the span of a query or key matrix: the public face of the mathematics."""

from __future__ import annotations

from spanopt.mathematics.formulations import get_formulation, set_formulation
from spanopt.mathematics.parts import decompose, orthonormal, project
from spanopt.mathematics.precision import default_ridge
from spanopt.mathematics.rescaled import rescale, rescale_by_document

__all__ = [
    "decompose",
    "default_ridge",
    "get_formulation",
    "orthonormal",
    "project",
    "rescale",
    "rescale_by_document",
    "set_formulation",
]
