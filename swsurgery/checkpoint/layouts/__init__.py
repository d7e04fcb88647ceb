"""Layouts: how quantised linear layers are stored, with one module per layout or family of layouts.

A layout says which weight the stored codes, scales and zero points of a module encode, scalar by scalar. This package
reads headers and single elements, and it must not depend on opening, planning or torch.
"""
