"""Define, read and write manifests, which state the edits that a user asks for.

A manifest is read strictly, and every fault is reported with its line and column. A patch is a manifest in a compact
form for export. This package must not depend on checkpoints, models or torch.
"""
