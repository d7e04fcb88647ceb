"""Apply edits to a checkpoint: plan them, copy or edit in place, check the result and revert.

Contains the planner, the copier, the edit in place, the edit in memory, the sanity check and the reversion. Must not
depend on scanning, verifying, sharing or the command line, and must not import torch; `model` runs the models.
"""
