"""EAGLE-3 for vLLM, see README.md. This file imports nothing, because setup.py reads the two constants from it."""

__version__ = "0.1.0"
VLLM_RANGE = ">=0.32,<0.34"
