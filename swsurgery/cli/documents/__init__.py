"""Descriptions of the JSON documents that the commands print with --json.

`schemas.py` lists the documents of each command and makes a JSON Schema of them. The other modules describe the
documents as pydantic models, one module per kind of command. They must not depend on how documents are made.
"""
