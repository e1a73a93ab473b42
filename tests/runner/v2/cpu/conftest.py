"""CPU forms of vLLM's Triton kernels, compared with the kernels, which run in Triton's interpreter here."""

from vllm_eagle3.runner import triton_interpreter

if triton_interpreter.enabled():
    import vllm.v1.worker.cpu.shm  # noqa: F401  before any module of v1.worker.gpu: it replaces names they import
else:
    collect_ignore_glob = ["test_*.py"]
