"""Publish patched checkpoints on the Hub, and export edits.

Contains the publication plan, the commit and its verification, the model card, and the exports as a patch, a LoRA
adapter and vLLM patches. Must not import `scanning` or `cli`, and never loads torch.
"""
