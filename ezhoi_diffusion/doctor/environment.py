"""The Python environment: packages that fit each other, a device, plugins, memory and disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from ezhoi_diffusion.doctor.finding import Finding, Level, ok
from ezhoi_diffusion.plugins import PluginManager

UNET1D = "denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d"
TORCHSCRIPT = "torch.load of TorchScript"
CUDA = "cuda"
PROBE_SECONDS = 300
GIB = 2**30
MIN_DISK = 5 * GIB
MIN_MEMORY = 4 * GIB  # EZ-HOI's peak, measured at eval with ViT-B/16
MIN_VRAM = 8 * GIB  # the guide's figure for extraction

# A library built for another torch may raise anything at import, or crash. So this runs in a process of its own,
# and each answer is one line, which counts even if the next import crashes.
PROBE = """
import gc, importlib, json, sys
gc.disable()  # imports make much that stays: to look for garbage in it took a fifth of their time
def torchscript():
    import os, tempfile, warnings
    warnings.simplefilter("ignore")
    import torch
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.pt")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), path)
        torch.load(path)
    return {}
def cuda():
    import torch
    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.ones(1, device=i).add(1).item()
        devices.append((torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)[0]))
    return {"built": torch.version.cuda, "devices": devices}
def package(name):
    module = importlib.import_module(name)
    if name.endswith("_1d"):
        module.Unet1D
    path = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return {"version": getattr(module, "__version__", None), "path": path}
for name in sys.argv[1:]:
    try:
        answer = {"cuda": cuda, "torch.load of TorchScript": torchscript}.get(name, lambda: package(name))()
    except BaseException as error:
        answer = {"error": (type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0])[:300]}
    print("\\nPROBED " + json.dumps([name, answer]), flush=True)
"""


def probe(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Import modules in another process.

    Returns:
        For each name its version and path, or `error`. A module that ends the process, or does not end, is an error too.
    """
    found: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in found]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROBE, *left], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
            )
            printed, ended = done.stdout, f"the import ended the process with status {done.returncode}"
        except subprocess.TimeoutExpired as late:
            partial = late.stdout or b""
            printed = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
            ended = f"the import did not end in {PROBE_SECONDS} s"
        for line in printed.splitlines():
            if line.startswith("PROBED "):
                name, answer = json.loads(line.removeprefix("PROBED "))
                found[name] = answer
        culprit = next((name for name in left if name not in found), None)
        if culprit is not None:
            found[culprit] = {"error": ended}
    return found


def packages(*, ezhoi: bool) -> Iterator[Finding]:
    """Check whether what this package and EZ-HOI import can be imported.

    Args:
        ezhoi: Whether an EZ-HOI run is asked about, which makes its needs problems.
    """
    found = probe(["torch", CUDA, "torchvision", UNET1D, "accelerate", "pocket", "clip", "pkg_resources", TORCHSCRIPT])
    reinstall = (
        "install both from one source: pip install --upgrade torch torchvision (with the --index-url of your CUDA)"
    )
    yield _imported("torch", found["torch"], "problem", reinstall)
    if "error" in found["torch"]:
        return  # all others need it
    version = found["torch"].get("version")
    mismatch = f"it does not match torch {version}, or is missing; {reinstall}"
    yield _imported("torchvision", found["torchvision"], "problem", mismatch)
    yield check_cuda(found[CUDA])
    yield _imported(
        "unet1d", found[UNET1D], "problem",
        "pip install denoising-diffusion-pytorch (the guide's \"Diffusion model not found\"; its submodule is not needed). If "
        "the error names torchvision, fix that first. The denoiser mlp needs neither",
    )  # fmt: skip
    yield _imported("accelerate", found["accelerate"], "problem", "training needs it: pip install 'accelerate>=1.0'")
    yield _imported(
        "pocket", found["pocket"], "warning",
        "EZ-HOI needs it: git clone https://github.com/fredzzhang/pocket && pip install -e pocket",
    )  # fmt: skip
    yield _check_clip(found["clip"])
    yield _imported(
        "pkg_resources", found["pkg_resources"], "warning",
        "EZ-HOI's CLIP imports it, and setuptools 81 dropped it: pip install 'setuptools<81'",
    )  # fmt: skip
    if "error" in found[TORCHSCRIPT]:
        yield Finding(
            "environment.torch_load", "problem" if ezhoi else "warning",
            f"torch {version} refuses TorchScript in a plain torch.load, and EZ-HOI reads CLIP's weights that way",
            "export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 for EZ-HOI runs whose weights you trust, or use torch < 2.6. This package "
            "does not need it",
        )  # fmt: skip
    else:
        yield ok("environment.torch_load", "a plain torch.load reads CLIP's TorchScript weights")


def _imported(name: str, answer: dict[str, Any], level: Level, fix: str) -> Finding:
    label = f"environment.{name}"
    if "error" in answer:
        return Finding(label, level, f"cannot be imported: {answer['error']}", fix)
    return ok(label, " at ".join(filter(None, (answer["version"], answer["path"]))) or "found")


def _check_clip(answer: dict[str, Any]) -> Finding:
    """Check that `import clip` finds OpenAI's package, or its copy in an EZ-HOI folder."""
    fix = "pip install -e CLIP in the EZ-HOI folder, or pip install git+https://github.com/openai/CLIP"
    path = Path(answer.get("path") or "")
    folder = path.parent if path.name == "__init__.py" else path
    if answer.get("path") and not any((folder / file).is_file() for file in ("clip.py", "clip.pyc")):
        found = f"`import clip` finds {path}, which is not CLIP"
        return Finding("environment.clip", "warning", found, f"pip uninstall clip; then {fix}")
    return _imported("clip", answer, "warning", f"EZ-HOI needs it: {fix}")


def check_cuda(facts: dict[str, Any]) -> Finding:
    """Check that torch can compute on every GPU that it sees.

    Args:
        facts: As PROBE prints them.
    """
    name = "environment.cuda"
    if "error" in facts:
        fix = "look at nvidia-smi; if a kernel image is missing, install a torch build for your GPU (pytorch.org lists them)"
        return Finding(name, "problem", f"torch cannot compute on a GPU: {facts['error']}", fix)
    if not facts["devices"]:
        built = facts["built"]
        why = f"torch was built for CUDA {built} and sees no GPU" if built else "this torch is a CPU build"
        fix = "look at nvidia-smi and CUDA_VISIBLE_DEVICES" if built else "install torch's CUDA build"
        return Finding(
            name, "warning", f"{why}; EZ-HOI needs one, training a bridge with the denoiser mlp does not", fix
        )
    listed = ", ".join(f"{device}: {free / GIB:.1f} GiB" for device, free in facts["devices"])
    if min(free for _, free in facts["devices"]) < MIN_VRAM:
        fix = "end other processes on the GPU (nvidia-smi), or choose another one with CUDA_VISIBLE_DEVICES"
        return Finding(name, "warning", f"free GPU memory {listed}; the guide asks for 8 GiB to extract", fix)
    return ok(name, f"CUDA {facts['built']}, free {listed}")


def plugins() -> Iterator[Finding]:
    """Check that every installed plugin takes part. Raises PluginError under EZHOI_DIFFUSION_STRICT."""
    name, found = "environment.plugins", PluginManager().found
    for info in found.values():
        if info.status == "broken":
            fix = f"reinstall its package, or silence it with EZHOI_DIFFUSION_DISABLE={info.name}"
            yield Finding(name, "warning", f"{info} is broken: {info.reason}", fix)
        elif info.status != "loaded":
            fix = "unset EZHOI_DIFFUSION_DISABLE and EZHOI_DIFFUSION_ALLOW to let it take part"
            yield Finding(name, "note", f"{info} is {info.status}: {info.reason}", fix)
    if all(info.status == "loaded" for info in found.values()):
        yield ok(name, f"{len(found)} work: {', '.join(found)}")


def space(folder: Path) -> Iterator[Finding]:
    """Check the disk where features lie or will lie, and main memory."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free at {folder.resolve()}; a capture of HICO-DET's training images takes 1.2 GiB and more"
    if free < MIN_DISK:
        level: Level = "problem" if free < GIB // 4 else "warning"
        yield Finding("environment.disk", level, found, "free space there or capture elsewhere")
    else:
        yield ok("environment.disk", found)
    memory = psutil.virtual_memory().available
    found = (
        f"{memory / GIB:.1f} GiB of main memory available; EZ-HOI takes 4 GiB, and more for each of its --num-workers"
    )
    if memory < MIN_MEMORY:
        yield Finding("environment.memory", "warning", found, "run EZ-HOI with --num-workers 0")
    else:
        yield ok("environment.memory", found)
