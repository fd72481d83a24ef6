"""The mathematics: projection onto the span of a query or key matrix, as pure tensor functions.

The *span* of a basis Q (``N`` tokens by ``d`` features) is its column space, a subspace of token
space R^N. Its orthogonal projector is P = Q (Q^T Q)^+ Q^T. A gradient g of Q splits exactly into a
*parallel part* P g and a *violation* g - P g.

This package imports nothing but torch and itself. The functions for users are in
:mod:`spanopt.projection`.
"""
