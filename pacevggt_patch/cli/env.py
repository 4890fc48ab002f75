"""`pacevggt env`: what a report of a fault needs to know of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.machine import describe_machine, told, without_home
from ..weights import cache

COLUMN = 18


def describe() -> dict[str, Any]:
    """The content of `pacevggt env --json`: the machine, where this package lies, and the calibrations kept."""
    own = {"package_path": without_home(Path(__file__).resolve().parent.parent)}
    return describe_machine() | own | {"calibrations": told(calibrations)}


def calibrations() -> dict[str, Any]:
    """Folder of the calibrations on this machine, None where none are kept, and names of the files."""
    folder = cache.folder()
    files = [path.name for path in cache.entries()]
    return {"folder": None if folder is None else without_home(folder), "files": files}


def format_environment(found: dict[str, Any]) -> str:
    """What `describe` found, as text for people."""
    build = f"CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
    rows = [
        ("pacevggt-patch", f"{found['pacevggt_patch']}, {found['package_path']}"),
        ("Python", found["python"]),
        ("platform", found["platform"]),
        ("CPU", f"{found['device']}, threads used: {found['threads']}"),
        ("torch", f"{found['torch']}, {build}"),
        *listed("GPU", found["gpus"], gpu_line),
        ("NVIDIA driver", found["driver"] or "none found"),
        ("SDPA may take", in_words(found["sdpa"], ", ".join)),
        ("FlashAttention-3", found["flash_attention_3"]),
        ("vggt", in_words(found["vggt"], vggt_line)),
        *listed("libraries", found["libraries"], lambda pair: f"{pair[0]:{COLUMN}}{pair[1]}"),
        *listed("variables", found["variables"], "=".join),
        ("calibrations", in_words(found["calibrations"], calibrations_line)),
    ]
    return "\n".join(f"{name:{COLUMN}}{value}" for name, value in rows)


def in_words(found: Any, line: Callable[[Any], str]) -> str:
    """What was found as text; it is text already where nothing could be found out."""
    return found if isinstance(found, str) else line(found)


def listed(name: str, found: Any, line: Callable[[Any], str]) -> list[tuple[str, str]]:
    """A row for each thing that was found, the first with a name."""
    if isinstance(found, str):
        return [(name, found)]
    lines = [line(value) for value in (found.items() if isinstance(found, dict) else found)]
    return [(name if index == 0 else "", text) for index, text in enumerate(lines or ["none"])]


def gpu_line(found: dict[str, Any]) -> str:
    return f"{found['name']}, {found['memory_gib']} GiB, compute capability {found['capability']}"


def vggt_line(found: dict[str, str] | None) -> str:
    if found is None:
        return "missing: install VGGT or a fork, or put its checkout on PYTHONPATH"
    return f"{found['path']} ({found['from']})"


def calibrations_line(found: dict[str, Any]) -> str:
    if found["folder"] is None:
        return f"none are kept ({cache.VARIABLE} is off)"
    return f"{len(found['files'])} in {found['folder']}" + "".join(
        f"\n{'':{COLUMN}}{n}" for n in found["files"]
    )
