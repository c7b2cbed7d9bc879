"""The Python environment: packages that fit each other, a device, plugins, memory and disk."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ezhoi_diffusion.doctor.finding import Finding, Level, ok
from ezhoi_diffusion.plugins import PluginManager

UNET1D = "denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d"
TORCHSCRIPT = "torch.load of TorchScript"
CUDA = "cuda"
PROBE_SECONDS = 300
GIB = 2**30
HOST_PEAK = 4 * GIB  # the real host's, measured at eval with ViT-B/16
VRAM = 8 * GIB  # the guide's figure for extraction

# Run in a process of its own: a library built for another torch may raise anything at import, or crash.
# Every answer is a line of its own, so that those before a crash count, and the crash has a name.
PROBE = """
import importlib, json, sys
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
    found = {"built": torch.version.cuda, "available": torch.cuda.is_available(), "arch": torch.cuda.get_arch_list()}
    if found["available"]:
        devices = range(torch.cuda.device_count())
        found["devices"] = [torch.cuda.get_device_name(i) for i in devices]
        found["capability"] = [torch.cuda.get_device_capability(i) for i in devices]
        found["free"] = [torch.cuda.mem_get_info(i)[0] for i in devices]
    return found
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
    """What importing each module gives, or `error`, found out in another process; one that crashes is named too."""
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


def packages(*, host: bool) -> Iterator[Finding]:
    """Versions, and whether what EZ-HOI and this package import can be imported. host: an EZ-HOI run is asked about."""
    own = f"ezhoi-diffusion {version('ezhoi-diffusion')}"
    yield ok("environment.python", f"{platform.python_version()} at {sys.executable}, {own}")
    found = probe(["torch", CUDA, "torchvision", UNET1D, "accelerate", "pocket", "clip", "pkg_resources", TORCHSCRIPT])
    torch_version = found["torch"].get("version")
    reinstall = (
        "install both from one source: pip install --upgrade torch torchvision (with the --index-url of your CUDA)"
    )
    yield _imported("torch", found["torch"], "problem", reinstall)
    if "error" in found["torch"]:
        return  # all others rest on it
    yield _imported(
        "torchvision", found["torchvision"], "problem",
        f"it does not match torch {torch_version}, or is missing; {reinstall}",
    )  # fmt: skip
    yield cuda_finding(found[CUDA])
    yield _imported(
        "unet1d", found[UNET1D], "problem",
        "pip install denoising-diffusion-pytorch (the guide's \"Diffusion model not found\"; its submodule is not needed). If "
        "the error names torchvision, mend that first. The denoiser mlp needs neither",
    )  # fmt: skip
    yield _imported("accelerate", found["accelerate"], "problem", "training needs it: pip install 'accelerate>=1.0'")
    yield _imported(
        "pocket", found["pocket"], "warning",
        "EZ-HOI needs it: git clone https://github.com/fredzzhang/pocket && pip install -e pocket",
    )  # fmt: skip
    yield _clip(found["clip"])
    yield _imported(
        "pkg_resources", found["pkg_resources"], "warning",
        "EZ-HOI's CLIP imports it, and setuptools 81 dropped it: pip install 'setuptools<81'",
    )  # fmt: skip
    if "error" in found[TORCHSCRIPT]:
        yield Finding(
            "environment.torch_load", "problem" if host else "warning",
            f"torch {torch_version} refuses TorchScript archives in a plain torch.load, and EZ-HOI reads CLIP's weights so "
            f"({found[TORCHSCRIPT]['error']:.80}…)",
            "export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 for runs of EZ-HOI whose weights you trust (this package never relies on "
            "it), or use torch < 2.6",
        )  # fmt: skip
    else:
        yield ok("environment.torch_load", "a plain torch.load reads CLIP's TorchScript weights")


def _imported(name: str, answer: dict[str, Any], level: Level, fix: str) -> Finding:
    label = f"environment.{name}"
    if "error" in answer:
        return Finding(label, level, f"cannot be imported: {answer['error']}", fix)
    return ok(label, " at ".join(filter(None, (answer["version"], answer["path"]))) or "found")


def _clip(answer: dict[str, Any]) -> Finding:
    """Which CLIP `import clip` finds: OpenAI's package, or the copy in an EZ-HOI folder."""
    finding = _imported(
        "clip", answer, "warning",
        "EZ-HOI needs it: pip install -e CLIP in the EZ-HOI folder, or pip install git+https://github.com/openai/CLIP",
    )  # fmt: skip
    path = answer.get("path")
    if not path:
        return finding
    folder = Path(path).parent if Path(path).name == "__init__.py" else Path(path)
    if not any((folder / file).is_file() for file in ("clip.py", "clip.pyc")):
        return Finding(
            finding.name, "warning", f"`import clip` finds {path}, which is not CLIP",
            "pip uninstall clip; then pip install -e CLIP in the EZ-HOI folder",
        )  # fmt: skip
    if (folder.parent.parent / "main_tip_finetune.py").is_file():
        return ok(
            finding.name,
            f"the repository's own, {folder} (with it, upstream's --self_image_path with --img_clip_pt asserts)",
        )
    return ok(finding.name, f"installed, {folder}")


def cuda_finding(facts: dict[str, Any]) -> Finding:
    """Whether the GPUs that torch sees can run what it was built for. facts: as PROBE gives them."""
    name = "environment.cuda"
    if "error" in facts:
        return Finding(name, "warning", f"torch cannot say: {facts['error']}", "see whether nvidia-smi works")
    if not facts["available"]:
        why = (
            f"torch was built for CUDA {facts['built']} and sees no GPU"
            if facts["built"]
            else "this torch is a CPU build"
        )
        return Finding(
            name, "warning", f"{why}; EZ-HOI itself needs one (training a bridge with the denoiser mlp does not)",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES" if facts["built"] else "install torch's CUDA build",
        )  # fmt: skip
    unable = [
        f"{device} (sm_{major}{minor})"
        for device, (major, minor) in zip(facts["devices"], facts["capability"], strict=True)
        if not _can_run(facts["arch"], major, minor)
    ]
    if unable:
        return Finding(
            name, "problem", f"torch was built for {' '.join(facts['arch'])}, which {', '.join(unable)} cannot run",
            "install a torch build for your GPU (pytorch.org lists them)",
        )  # fmt: skip
    short = [f"{device}: {free / GIB:.1f} GiB" for device, free in zip(facts["devices"], facts["free"], strict=True)]
    if min(facts["free"]) < VRAM:
        return Finding(
            name, "warning", f"free GPU memory {', '.join(short)}; the guide asks for 8 GiB to extract",
            "end other processes on the GPU (nvidia-smi), or choose another with CUDA_VISIBLE_DEVICES. A capture already "
            "has batches of one image",
        )  # fmt: skip
    return ok(name, f"CUDA {facts['built']}, free {', '.join(short)}")


def _can_run(arch: list[str], major: int, minor: int) -> bool:
    """Binary code runs on its own major version from its minor on; PTX (compute_*) on anything newer."""
    for entry in arch:
        kind, _, number = entry.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        built = (int(digits[:-1]), int(digits[-1])) if len(digits) > 1 else (99, 0)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def plugins() -> Iterator[Finding]:
    """Every plugin that was found and cannot take part. Raises PluginError under EZHOI_DIFFUSION_STRICT."""
    found = PluginManager().found
    for info in found.values():
        if info.status != "loaded":
            yield Finding(
                "environment.plugins", "warning" if info.status == "broken" else "note", f"{info} is {info.status}: {info.reason}",
                f"reinstall its package, or silence it with EZHOI_DIFFUSION_DISABLE={info.name}"
                if info.status == "broken" else "unset EZHOI_DIFFUSION_DISABLE / EZHOI_DIFFUSION_ALLOW if it is to take part",
            )  # fmt: skip
    loaded = [name for name, info in found.items() if info.status == "loaded"]
    yield ok("environment.plugins", f"{len(loaded)} work: {', '.join(loaded)}")


def space(folder: Path) -> Iterator[Finding]:
    """Disk where features lie or will lie, and main memory."""
    free = shutil.disk_usage(folder).free
    level: Level = "problem" if free < GIB // 4 else "warning" if free < 5 * GIB else "ok"
    fix = "free space there or capture elsewhere" if level != "ok" else ""
    yield Finding(
        "environment.disk", level,
        f"{free / GIB:.1f} GiB free at {folder.resolve()}; a capture of HICO-DET's 38,118 training images takes 1.2 GiB and more at D = 512, by "
        f"count of at least 15 pairs an image", fix,
    )  # fmt: skip
    memory = available_memory()
    if memory is None:
        return
    tight = memory < HOST_PEAK
    yield Finding(
        "environment.memory", "warning" if tight else "ok",
        f"{memory / GIB:.1f} GiB of main memory available; EZ-HOI with ViT-B/16 was measured at 4 GiB in eval mode, and each "
        f"loader process (--num-workers) adds to it",
        "run the host with --num-workers 0; a capture already has batches of one image" if tight else "",
    )  # fmt: skip


def available_memory() -> int | None:
    """Bytes that Linux says are available; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
