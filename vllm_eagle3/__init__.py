"""EAGLE-3 for vLLM: see README.md."""

__version__ = "0.1.0"
