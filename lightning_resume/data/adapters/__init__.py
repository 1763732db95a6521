"""Loaders whose order is not ours to give: one adapter for each kind.

Their position is the state that they keep themselves, or, where they keep none, the number of batches taken: the same
batches are then read again and skipped.
"""
