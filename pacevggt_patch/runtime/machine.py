"""What a report of a fault needs to know of the machine. Nothing is loaded onto a GPU, and no network is asked."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import first_line
from .attention import HOPPER, LIBRARIES, library
from .files import environment
from .plotting import install_hint

DISTRIBUTION = "pacevggt-patch"
FOR_DEVELOPERS = ("test", "dev")  # extras that no user needs
OWN = "PACEVGGT_"
# Others that change what this package does or how fast it is. None of them holds a secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "LOCAL_RANK", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_CACHE_DIR", "TORCH_LOGS", "WORLD_SIZE", "XDG_CACHE_HOME",
)  # fmt: skip
KERNELS = {"flash": "flash_sdp_enabled", "memory-efficient": "mem_efficient_sdp_enabled",
           "cuDNN": "cudnn_sdp_enabled", "math": "math_sdp_enabled"}  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Versions, GPUs, attention kernels, VGGT, libraries and environment variables, fit for JSON.

    What can't be found out is told in words in its place: nothing is raised. Paths have `~` for the user's home.
    """
    return environment("cpu") | {
        "cuda": torch.version.cuda,
        "gpus": told(gpus),
        "driver": told(driver),
        "sdpa": told(sdpa_kernels),
        "flash_attention_3": told(flash_attention),
        "vggt": told(vggt),
        "libraries": told(libraries),
        "variables": {
            name: without_home(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(OWN) or name in VARIABLES
        },
    }


def told(find: Callable[[], Any]) -> Any:
    """What a function finds, or why it does not."""
    try:
        return find()
    except Exception as error:  # drivers and broken installations fail in ways of their own
        return f"not known: {first_line(error)}"


def without_home(text: str | Path) -> str:
    """A path, or several, with `~` for the user's home."""
    home = os.path.expanduser("~")
    return (
        str(text)
        if len(home) < 2
        else re.sub(rf"{re.escape(home)}(?=[{os.sep}{os.pathsep}]|$)", "~", str(text))
    )


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB and compute capability of each GPU that torch sees."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
        for p in found
    ]


def driver() -> str | None:
    """Version of NVIDIA's driver; None where it has no program that tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        return None
    return ", ".join(sorted(set(done.stdout.split())))


def sdpa_kernels() -> list[str]:
    """Kernels that torch's `scaled_dot_product_attention` may take; on the CPU it chooses by itself."""
    backends = torch.backends.cuda
    return [name for name, asks in KERNELS.items() if getattr(backends, asks, lambda: False)()]


def flash_attention() -> str:
    """Which library of FlashAttention-3 is used, or why none is."""
    if not torch.cuda.is_available():
        return "not used: there is no CUDA GPU"
    found = library(torch.device("cuda", torch.cuda.current_device()))
    if found is not None:
        enabled = torch.backends.cuda.flash_sdp_enabled()
        return (
            f"{found.name}" if enabled else f"not used: {found.name} is there, but enable_flash_sdp is False"
        )
    major, minor = torch.cuda.get_device_capability()
    if major != HOPPER:
        return f"not used: it needs a GPU of compute capability {HOPPER}.x, this one has {major}.{minor}"
    return "not used: " + "; ".join(f"{name} {why_not(name)}" for name in LIBRARIES)


def why_not(name: str) -> str:
    """Why a module that is not used can't be."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == name else f"lacks {error.name}"
    except Exception as error:
        return f"can't be imported ({first_line(error)})"
    return "has no flash_attn_func"


def vggt() -> dict[str, str] | None:
    """Where `vggt` would be imported from, and what brought it; None where there is none. It is not imported."""
    spec = importlib.util.find_spec("vggt")
    if spec is None:
        return None
    place = spec.origin or next(iter(spec.submodule_search_locations or ()), "nowhere")
    brought = importlib.metadata.packages_distributions().get("vggt", [])
    names = [f"{name} {importlib.metadata.version(name)}" for name in sorted(set(brought))]
    return {"path": without_home(place), "from": ", ".join(names) or "a checkout, no installed package"}


def libraries() -> dict[str, str]:
    """Versions of what this package needs or may use, by the names that pip knows, and how to get what is missing."""
    found = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        name, extra = requirement(line)
        if extra in FOR_DEVELOPERS or name == DISTRIBUTION:  # an extra may ask for another
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.setdefault(name, f"missing; {install_hint(extra)}")
    return dict(sorted(found.items()))


def requirement(line: str) -> tuple[str, str]:
    """Name and extra, "" if it is always needed, of a requirement such as `av>=13.0; extra == 'video'`."""
    name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
    return name.group() if name else line, extra.group(1) if extra else ""
