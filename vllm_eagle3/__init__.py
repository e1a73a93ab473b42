"""EAGLE-3 for vLLM: see README.md. Written without imports: setup.py reads the two constants from here."""

__version__ = "0.1.0"
VLLM_RANGE = ">=0.32,<0.34"
