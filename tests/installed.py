"""The package without its repository: archives of this tree, and an environment that has the wheel installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.harness import ROOT

# Tests and benchmarks too: the archives must be without them.
PARTS = ("ds_sft", "ds_configs", "slurm", "tests", "benchmarks", "setup.cfg", "pyproject.toml", "MANIFEST.in",
         "README.md", "LICENSE")  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and all else from that of the tests."""

    folder: Path
    wheel: Path
    source: Path  # the tree that it was built from, a copy

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def env(self) -> dict[str, str]:
        """What its user has set; torchrun and deepspeed are programs of the tests' environment, for its Python."""
        path = [str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {"PATH": os.pathsep.join(path), "PYTHONPATH": ""}

    def ds_sft(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Call `ds-sft`."""
        command = [str(self.bin / "ds-sft"), *words]
        return subprocess.run(
            command, cwd=cwd, env={**os.environ, **self.env}, capture_output=True, text=True, check=False
        )


def install(folder: Path) -> Installed:
    """Build the wheel of this tree in `folder`, and install it there."""
    source = copy_of_the_tree(folder / "source")
    wheel = build("wheel", source, folder / "dist")
    environment = folder / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, check=True)  # a path to the clone would do for pip
    (site,) = environment.glob("lib/python*/site-packages")
    # By a line of its own, and not as a site: what points from there to the clone is not read.
    (site / "tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return Installed(environment, wheel, source)


def copy_of_the_tree(folder: Path) -> Path:
    """A build leaves files in its tree; links stay links."""
    folder.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, source: Path, into: Path) -> Path:
    """The archive of a tree, "wheel", "editable" or "sdist", by the hooks that pip calls."""
    into.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = into.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return archive
