"""Compute new values for regions of stored tensors: zero, scale, set, clip, prune and round.

The package works on arrays of bit patterns and gives the same bits for every block size. It must not depend on
checkpoints, manifests or files, so that planning an edit and verifying it can both use it.
"""
