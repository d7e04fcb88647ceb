"""A server that speaks the Hub's protocol on loopback, for the real huggingface_hub client; no part of the product."""
