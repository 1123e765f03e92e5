# SPDX-License-Identifier: Apache-2.0
"""A CPU as a platform of vLLM-Omni's diffusion engine, which has none.

It is a module of its own: the engine looks it up while it is itself being imported, so it may import nothing
of the engine before it is asked for the class.
"""

from __future__ import annotations

from typing import Any


def platform() -> str:
    """Where the class is: the entry point."""
    return "omni_cpu_platform.CpuOmniPlatform"


def __getattr__(name: str) -> Any:
    if name != "CpuOmniPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import psutil
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    def nothing(_cls: type, *_args: Any) -> None:
        """There is no device to choose, to wait for or to empty."""

    def none(_cls: type, *_args: Any) -> int:
        return 0

    def memory(_cls: type, _device: Any = None) -> tuple[int, int]:
        now = psutil.virtual_memory()
        return now.available, now.total

    def attention(_cls: type, *_args: Any, **_options: Any) -> str:
        return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

    class CpuOmniPlatform(OmniPlatform, CpuPlatform):
        _omni_enum = OmniPlatformEnum.OOT
        dist_backend = "gloo"
        get_torch_device = classmethod(lambda cls, local_rank=None: torch.device("cpu"))
        get_device_count = classmethod(lambda cls: 1)
        get_device_version = classmethod(lambda cls: None)
        supports_torch_inductor = supports_cpu_offload = classmethod(lambda cls: False)
        set_device = synchronize = empty_cache = reset_peak_memory_stats = classmethod(nothing)
        max_memory_reserved = max_memory_allocated = classmethod(none)
        get_device_memory = classmethod(memory)
        get_free_memory = classmethod(lambda cls, device=None: memory(cls)[0])
        get_diffusion_attn_backend_cls = classmethod(attention)

    CpuOmniPlatform.__module__, CpuOmniPlatform.__qualname__ = __name__, "CpuOmniPlatform"
    globals()["CpuOmniPlatform"] = CpuOmniPlatform
    return CpuOmniPlatform
