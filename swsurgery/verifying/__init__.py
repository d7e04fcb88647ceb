"""Prove and check checkpoints and manifests.

Contains the proofs against a record, a base, a manifest, the known super weights and a signature, the rules and their
output formats, and the linter. Must not import `scanning`, `sharing` or `cli`, and never loads torch.
"""
