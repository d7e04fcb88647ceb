"""Read and write the bytes of a checkpoint on disk.

Contains files and directories, the safetensors header, dtypes, coordinates, splices, strict JSON, staging and hashing.
Must not depend on any other package of swsurgery, and imports neither torch nor huggingface_hub.
"""
