"""Find super weights and measure what zeroing or scaling them does.

The package contains two detectors of super weights (by activations and by weights), the causal test, and the sweep over
factors. It also makes reports, figures, manifests and entries of known super weights from their results. It must not
import `verifying`, `sharing` or `cli`, and this file must not import anything that loads torch or matplotlib.
"""
