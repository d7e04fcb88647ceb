"""Find super weights and measure what zeroing or scaling them does.

The package contains two detectors (by activations and by weights), the causal test, the sweep over factors, and the
reports, figures, manifests and entries made from their results. It must not import `verifying`, `sharing` or `cli`.
This file must not import anything that loads torch or matplotlib.
"""
