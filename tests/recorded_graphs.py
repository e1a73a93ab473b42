"""CUDA graphs on a CPU: the operations of one run are recorded and replayed on the same memory.

As in a CUDA graph, values that Python computes while recording do not change in a replay, and the host must not read a
tensor.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_flatten
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_eagle3.kernels import cpu

ON_THE_HOST = (torch.ops.aten.item, torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Recording(TorchDispatchMode):
    """A context in which each torch operation is run and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.replays: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in ON_THE_HOST:
            raise AssertionError(f"{func} waits for the device: a CUDA graph cannot hold it")
        return self.keep(func, *args, **(kwargs or {}))

    def keep(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a function and keep it as one operation."""
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
        fresh = [t.untyped_storage().data_ptr() not in given for t in tensors_of(out)]

        def replay() -> None:
            again = tensors_of(func(*args, **kwargs))
            for old, new, own in zip(tensors_of(out), again, fresh, strict=True):
                if own:
                    old.copy_(new)

        self.replays.append(replay)
        return out


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def as_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that is one kernel on CUDA devices but reads lengths on the host elsewhere."""

    def call(*args: Any, **kwargs: Any) -> Any:
        mode = _get_current_dispatch_mode()
        if not isinstance(mode, Recording):
            return function(*args, **kwargs)
        with _disable_current_modes():
            return mode.keep(function, *args, **kwargs)

    return call


def record_graphs(monkeypatch: Any, sizes: list[int]) -> dict[type, list[int]]:
    """Make the engines of this process record full CUDA graphs of `sizes` tokens for decoding instead of capturing.

    vLLM's own code still manages the graphs and chooses among them. Nothing is recorded before `capture`.

    Returns the requests of each replayed graph, by the class of its manager.
    """
    replayed: dict[type, list[int]] = defaultdict(list)

    def resolve(config: Any, *args: Any, **kwargs: Any) -> CUDAGraphMode:
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, max(sizes)
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        return config.cudagraph_mode

    def capture_each(self: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for batch in self._capture_descs.get(CUDAGraphMode.FULL, []):
            create_forward_fn(batch, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(batch, warmup=False)
            with Recording() as recording:
                forward(CUDAGraphMode.NONE)
            self.graphs[batch] = recording
        self._graphs_captured = True

    def run_fullgraph(self: Any, batch: Any) -> None:
        replayed[type(self)].append(batch.num_reqs)
        for replay in self.graphs[batch].replays:
            replay()

    monkeypatch.setattr(CompilationConfig, "resolve_cudagraph_mode_and_sizes", resolve)
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(CudaGraphManager, "capture", capture_each)
    monkeypatch.setattr(CudaGraphManager, "run_fullgraph", run_fullgraph)
    for name in ("tree_attention", "path_attention", "top_children"):
        monkeypatch.setattr(cpu, name, as_one(getattr(cpu, name)))
    return replayed


@torch.inference_mode()
def capture(runner: Any) -> None:
    """Capture the same graphs as `capture_model`, which would ask an accelerator for its memory."""
    for layer in runner.compilation_config.static_forward_context.values():
        layer.use_direct_call = True  # its operations, not one that hides them
    runner.cudagraph_manager.capture(
        runner.model, runner.model_state, runner.input_buffers, None, runner.block_tables, runner.attn_groups,
        runner.kv_cache_config, use_aux_hidden_state_outputs=runner.use_aux_hidden_state_outputs,
    )  # fmt: skip
    runner.speculator.capture()
