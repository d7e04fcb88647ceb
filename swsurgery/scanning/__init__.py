"""Find super weights and measure what zeroing or scaling them does.

The package contains two detectors (by activations and by weights), the causal test, the sweep over factors, and the
reports, figures, manifests and entries that are made of their results. It must not import `verifying`, `sharing` or
`cli`, and nothing that loads torch or matplotlib may be imported here.
"""
