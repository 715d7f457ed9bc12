"""What vLLM's classes for GPUs ask of a GPU while they are made, in place of which there is nothing here.

They are made and loaded, and never run: streams, pinned memory and the choice of a kernel change no parameter.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


class Nothing:
    """In place of a stream or an event of a GPU."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


_MODULES: dict[str, tuple[str, ...]] = {
    "vllm.vllm_flash_attn": ("flash_attn_varlen_func", "is_fa_version_supported"),
    "vllm.vllm_flash_attn.flash_attn_interface": ("flash_attn_varlen_func",),
    "vllm.third_party.deep_gemm": ("per_block_cast_to_fp8",),
}
"""Modules that a build for GPUs has, and what is imported of them: functions that answer nothing."""
_NAMES = {
    "vllm.v1.attention.backends.fa_utils": (
        *("compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func", "get_scheduler_metadata"),
        "reshape_and_cache_flash",
    ),
}
"""The same of modules that every build has."""
_MADE: dict[str, dict[str, str]] = {
    "vllm.models.deepseek_v4.nvidia.model": {"DeepseekV4ForCausalLM": "DeepseekV4ForCausalLM"},
    "vllm.models.deepseek_v4.nvidia.mtp": {"DeepSeekV4MTPModel": "DeepSeekV4MTP"},
}
"""By module, vLLM's names of classes for which it has others on CPUs, and those that it takes on GPUs."""
_EVERYWHERE: dict[str, dict[str, Callable[..., Any]]] = {
    "vllm.utils.torch_utils": {"get_accelerator_view_from_cpu_tensor": lambda tensor: tensor.detach()},
    "vllm.v1.attention.backends.fa_utils": {"is_flash_attn_varlen_func_available": lambda: True},
    "vllm.models.deepseek_v4.nvidia.ops.o_proj": {"compute_fp8_einsum_recipe": lambda: ((1, 128, 128), False)},
}
"""Functions that ask for a GPU, by module, and what they answer wherever they were imported."""


def without_gpus(register: Callable[[str, type], None]) -> None:
    """Have the classes made without a GPU. register: how vLLM is told of another class for a name of its own."""
    os.environ |= {"VLLM_KIMI_K3_GEMM_AR": "0"}
    torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[assignment,misc]
    made = torch.empty

    def unpinned(*sizes: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        return made(*sizes, **options)

    torch.empty = unpinned
    triton = importlib.import_module("vllm.triton_utils").triton
    triton.next_power_of_2 = lambda size: 1 << (size - 1).bit_length()
    for module, functions_of_it in _MODULES.items():
        made_up = ModuleType(module)
        vars(made_up).update(dict.fromkeys(functions_of_it, lambda *_, **__: None), __path__=[])
        sys.modules[module] = made_up
    for module, functions_of_it in _NAMES.items():
        vars(importlib.import_module(module)).update(dict.fromkeys(functions_of_it, lambda *_, **__: None))
    for module, names in _MADE.items():
        for name, kind in names.items():
            register(name, getattr(importlib.import_module(module), kind))
    for module, functions in _EVERYWHERE.items():
        for name, answer in functions.items():
            everywhere(name, getattr(importlib.import_module(module), name), answer)


def everywhere(name: str, function: object, other: object) -> None:
    """Put another function in place of one of vLLM's, in every module of vLLM that has imported it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(name) is function:
            setattr(module, name, other)
