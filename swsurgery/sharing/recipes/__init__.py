"""Render configurations of quantisers that keep the modules with super weights in high precision.

Contains one module per tool and the table of tools. Must not import the tools, torch or `cli`.
"""
