"""How much memory an engine that this project starts needs, and whether that much is free.

By default vLLM requires 92 % of a GPU, or of a CPU's memory node, and stops if less is free. The demo, the evaluation,
the sweep and the training know their batch and length, so they ask only for what these need, by
`kv_cache_memory_bytes`. On a CPU vLLM then ignores its share of the memory. On a GPU it still requires that
`gpu_memory_utilization` of the whole memory is free at the start, so that share is set as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GB = 10**9
BLOCK = 128
"""The most tokens in a block of the KV cache: 128 on a CPU, 16 on most GPUs."""
WORKING_BYTES = {"cpu": int(1.5 * GB), "cuda": 4 * GB}
"""Python, PyTorch and vLLM themselves, activations, compiled code and CUDA graphs."""
WEIGHT_FILES = ("*.safetensors", "*.bin")


class NotEnoughMemoryError(RuntimeError):
    """An engine needs more memory than is free."""


@dataclass(frozen=True)
class FreeMemory:
    """The memory of a device, in bytes."""

    free: int
    total: int
    place: str
    """The name of the device in messages."""
    device: str
    """"cpu" or "cuda"."""


def free_memory() -> FreeMemory:
    """The memory of the first GPU, or of the memory node that vLLM would use on a CPU."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return FreeMemory(free, total, "GPU 0", "cuda")
    from vllm.utils import cpu_resource_utils as cpu

    node, visible = cpu.get_allowed_cpu_list()[0].numa_node, cpu.get_visible_memory_node()
    if node not in visible:
        node = visible[0]
    status = cpu.get_memory_node_info(node)
    return FreeMemory(status.available_memory, status.total_memory, f"memory node {node}", "cpu")


def memory_arguments(
    target: str | Path,
    draft: str | Path | None,
    *,
    batch_size: int,
    max_model_len: int,
    drafts: int = 0,
    dtype: str = "auto",
    least: int | None = None,
) -> dict[str, Any]:
    """The keyword arguments of `vllm.LLM` that reserve what these requests need.

    Args:
        target: directory or name of the target.
        draft: directory or name of the draft; None for an engine that does not speculate.
        batch_size: the most requests at a time.
        max_model_len: longest prompt and answer, in tokens.
        drafts: tokens drafted in one step for each request.
        dtype: vLLM's `dtype`.
        least: how many requests of full length must fit at the same time (vLLM lets others wait); None for all.

    Raises:
        NotEnoughMemoryError: less is free. The message says what is needed, what is free and what to change.
    """
    from transformers import AutoConfig, PretrainedConfig

    config = AutoConfig.from_pretrained(target).get_text_config().to_dict()
    # With dtype "auto", vLLM runs checkpoints of any dtype in 16 bits.
    width = 2 if dtype == "auto" else getattr(torch, dtype).itemsize
    configs = [config]
    if draft is not None:
        given = PretrainedConfig.get_config_dict(draft)[0]
        configs.append(config | {"num_hidden_layers": 1} | given.get("transformer_layer_config", given))
    length = max_model_len + drafts
    least_cache = kv_cache_bytes(configs, batch_size if least is None else least, length, width)
    weights = sum(weight_bytes(Path(path), width) for path in (target, draft) if path is not None)
    memory = free_memory()
    working = WORKING_BYTES[memory.device]
    if least_cache + weights + working > memory.free:
        raise NotEnoughMemoryError(
            f"{memory.place}: this engine needs about {(least_cache + weights + working) / GB:.1f} GB (weights "
            f"{weights / GB:.1f}, KV cache {least_cache / GB:.1f}, working memory {working / GB:.1f}), but "
            f"{memory.free / GB:.1f} of {memory.total / GB:.1f} GB are free. End other processes, or choose a smaller "
            "batch or length"
        )
    cache = min(kv_cache_bytes(configs, batch_size, length, width), memory.free - weights - working)
    arguments: dict[str, Any] = {"kv_cache_memory_bytes": cache}
    if memory.device == "cuda":
        arguments["gpu_memory_utilization"] = (cache + weights + working) / memory.total
    return arguments


def kv_cache_bytes(configs: Sequence[Mapping[str, Any]], batch_size: int, length: int, width: int) -> int:
    """Bytes of the keys and values of `batch_size` requests of `length` tokens.

    Each layer counts as much as the widest layer, because vLLM gives all layers blocks of the same size. A model with
    compressed or windowed attention needs less than this.

    Args:
        configs: the configs of the text models: the target's and, if there is one, the draft's.
        batch_size: requests.
        length: tokens of each.
        width: bytes of a number.
    """
    layers = sum(config["num_hidden_layers"] for config in configs)
    widest = max(_kv_heads(config) * _head_dim(config) for config in configs)
    blocks = batch_size * -(-length // BLOCK) + 2  # vLLM keeps one block for itself
    return 2 * layers * widest * width * blocks * BLOCK


def weight_bytes(folder: Path, width: int) -> int:
    """Bytes of a checkpoint in memory. 0 if it has no files on this machine (a model's name, random weights).

    Args:
        folder: its directory.
        width: bytes per number in the engine's dtype. The files are assumed to have two bytes per number.
    """
    for pattern in WEIGHT_FILES:
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes) * max(width // 2, 1)
    return 0


def _kv_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
