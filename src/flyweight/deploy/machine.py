"""What a measurement was made on: the processor, its flags, and the versions. No library is imported to ask."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

__all__ = ["SEVEN_BITS", "describe", "fingerprint", "flags", "has_vnni", "largest_weight", "version_of", "versions"]

# The flags that choose between the runtime's kernels; prefixes, since the kernel spells amx_int8, amx_tile, …
KERNEL_FLAGS = (
    "sse4_1",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx",
    "asimd",
    "i8mm",
)
SEVEN_BITS = 63  # the largest weight of so many
PACKAGES = (
    "flyweight",
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "onnxscript",
    "onnx-ir",
    "numpy",
    "scipy",
    "safetensors",
)


def describe() -> dict[str, str]:
    """Facts about this machine: cpu, flags (that choose kernels), cores, ram, os, python; "unknown" where it is."""
    return {
        "cpu": _cpu_model(),
        "flags": " ".join(sorted(flag for flag in flags() if flag.startswith(KERNEL_FLAGS))) or "unknown",
        "cores": str(_cores()),
        "ram": _ram(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Package -> installed version, of those that shape an artifact or a measurement; what is missing is left out."""
    return {name: version for name in PACKAGES if (version := version_of(name))}


def has_vnni() -> bool:
    """Whether this processor multiplies and adds int8 in one instruction (VNNI of either kind, AMX, or Arm's i8mm)."""
    return any(flag.startswith(("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")) for flag in flags())


def largest_weight() -> int:
    """The largest int8 weight with which no product saturates here: 127; 63, seven bits, where the processor adds two products
    of an unsigned and a signed byte in 16 bits (2 * 255 * 64 fits, 2 * 255 * 127 does not)."""
    return 127 if has_vnni() else SEVEN_BITS


def fingerprint(runtime: str = "onnxruntime") -> str:
    """Twelve hex digits that change when times measured here no longer hold: processor, flags, cores or runtime.

    Memory size, kernel release and Python are left out: they change without moving the times of one operator.
    """
    machine = describe()
    parts = [machine["cpu"], machine["flags"], machine["cores"], platform.machine(), runtime, version_of(runtime)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@functools.cache
def flags() -> frozenset[str]:
    """All instruction-set flags that the system reports, lower case; empty where it reports none."""
    fields = _cpuinfo()
    return frozenset((fields.get("flags") or fields.get("Features") or "").lower().split())


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The first value of every field of /proc/cpuinfo's text."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _cpuinfo() -> Mapping[str, str]:
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        return {}


def _cpu_model() -> str:
    fields = _cpuinfo()
    return fields.get("model name") or fields.get("Hardware") or platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Cores this process may use, which in a container is less than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _ram() -> str:
    try:
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{pages * page_bytes / 2**30:.1f} GiB"


def version_of(package: str) -> str:
    """The installed version of a package, "" where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
