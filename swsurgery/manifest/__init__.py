"""Everything about what the user asks for: operations, targets, the schema, and the readers and writers of manifests.

A manifest is read strictly, with the line and column of every fault, and a patch is its compact form for export.
This package must not depend on checkpoints, models or torch.
"""
