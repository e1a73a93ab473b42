"""Triton kernels of the draft step, each with a plain-torch twin. No vLLM import in here."""
