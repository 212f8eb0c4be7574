"""A virtual environment for each peer, made once from the package registry and reused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# What each is measured at. torch comes first and at one version for all, so that the same kernels run; for its build
# without CUDA set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
TORCH = "torch==2.13.0"
PEERS = {
    "trl": ("trl==1.16.0", "transformers==5.23.0", "deepspeed==0.19.8", "peft==0.21.2"),
    "llamafactory": ("llamafactory==0.9.5", "transformers==5.6.0", "deepspeed==0.19.8"),
    "ms-swift": ("ms-swift==4.6.0", "transformers==5.19.0", "deepspeed==0.19.8"),
}


def make_environment(peer: str, folder: Path) -> Path:
    """The folder of the peer's environment, whose `bin` has its commands.

    Raises:
        RuntimeError: pip could not install it; the message is its error line.
    """
    home, wanted = folder / peer, "\n".join([TORCH, *PEERS[peer]])
    done = home / ".installed"
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return home
    print(f"installing {', '.join(PEERS[peer])} into {home}, a few minutes", flush=True)
    call(sys.executable, "-m", "venv", str(home))
    pip = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # DeepSpeed's own set-up looks for torch.
    call(*pip, "install", "--progress-bar=off", TORCH, "ninja", "setuptools", "wheel")
    call(*pip, "install", "--progress-bar=off", TORCH, *PEERS[peer])
    if peer == "llamafactory":
        replace_media_packages(pip, home)
    done.write_text(wanted, encoding="utf-8")
    return home


def replace_media_packages(pip: list[str], home: Path) -> None:
    """The registry's torchvision and torchaudio are built for CUDA and do not load beside a CPU torch.

    Nothing of them is used for text, but LLaMA-Factory imports the second: it gets an empty one.
    """
    call(*pip, "uninstall", "--yes", "torchvision", "torchaudio")
    for site in home.glob("lib/python3*/site-packages"):
        (site / "torchaudio").mkdir(exist_ok=True)
        for name in ("__init__.py", "functional.py"):
            (site / "torchaudio" / name).write_text("from . import functional\n" if name[0] == "_" else "")


def call(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or done.stdout.splitlines()
        raise RuntimeError(f"{' '.join(command[1:4])}: {(lines or ['failed'])[0]}")
