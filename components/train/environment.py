"""What besides data, code and configuration decides the bytes that training gives."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

_ENGINES = ("torch", "numpy", "pyarrow", "safetensors")


def training_environment(device: str) -> dict[str, str]:
    """Versions, processor and device, by name.

    Args:
        device: PyTorch's name of the device that was trained on.
    """
    kind = torch.device(device)
    accelerator = torch.cuda.get_device_name(kind) if kind.type == "cuda" else "none"
    return {
        **{name: version(name) for name in _ENGINES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerator": accelerator,
        "cuda": torch.version.cuda or "none",
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
