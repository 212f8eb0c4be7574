"""The rules of the house: imports point one way, ruff and mypy are silent, shipped files load."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ds_sft.commands.demo import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ds_sft"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The rooms of the package from the ground up: each may import those before it that are named, and itself.
ALLOWED = {
    "errors": "",
    "results": "",
    "quiet": "",
    "shipped": "",
    "upstream": "errors",
    "config": "errors",
    "plan": "errors config",
    "ranks": "errors config results",
    "engine": "errors config ranks shipped",
    # `Launch` says who encodes and who prints; data/ knows nothing else of where it runs.
    "data": "errors config ranks",
    "model": "errors config plan ranks engine data",
    "checkpoints": "errors config plan ranks engine model results",
    "export": "errors config plan ranks engine data model checkpoints results",
    "training": "errors upstream config plan ranks engine data model checkpoints export results",
    "evaluation": "errors config plan ranks data model export training",
    "tracking": "errors config ranks results",
    "finish": "errors config plan ranks engine data checkpoints export training evaluation tracking results",
    "commands": "errors config plan ranks engine data model checkpoints export training evaluation tracking "
    "results shipped",
}
# These answer at once: neither library may be loaded by importing them.
LIGHT = [
    "ds_sft.config.read",
    "ds_sft.cli",
    "ds_sft.errors",
    "ds_sft.train",
    "ds_sft.upstream.check",
    "ds_sft.ranks.launch",
    "ds_sft.ranks.devices",
    "ds_sft.engine.zero",
    "ds_sft.checkpoints.start",
    "ds_sft.checkpoints.folder_lock",
    "ds_sft.checkpoints.identity",
    "ds_sft.ranks.stop",
    "ds_sft.quiet",
    "ds_sft.plan.source",
    "ds_sft.plan.layouts",
    "ds_sft.plan.schedule",
    "ds_sft.plan.disk",
    "ds_sft.commands.plan",
    "ds_sft.commands.sweep",
    "ds_sft.checkpoints.requeue",
    "ds_sft.plan.size",
    "ds_sft.ranks.network",
    "ds_sft.ranks.nodes",
    "ds_sft.plan.steps",
    "ds_sft.commands.launch",
    "ds_sft.commands.rows",
    "ds_sft.commands.doctor",
    "ds_sft.commands.report",
    "ds_sft.commands.report_page",
    "ds_sft.commands.init",
    "ds_sft.commands.evaluate",
    "ds_sft.ranks.work",
]


def imports_of(file: Path) -> set[str]:
    """The ds_sft modules that a file imports anywhere in it, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {known for name in names if (known := module_of(name))}
    return found


def module_of(name: str) -> str | None:
    """The module of ds_sft that a dotted name is of, without the package's name; None where there is none."""
    parts = name.split(".")
    if parts[0] != "ds_sft":
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file():
            return ".".join(parts[1:end])
    return None


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    room = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if room in ("__init__", "__main__", "cli", "train"):  # the top: they may import everything
        return
    rooms = {name.partition(".")[0] for name in imports_of(file)}
    assert rooms - {room, *ALLOWED[room].split()} == set(), f"{room}/ may not import"


def test_no_module_imports_itself_through_others() -> None:
    graph = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): imports_of(file) for file in MODULES}
    order = TopologicalSorter(graph)
    order.prepare()  # a circle raises CycleError, which names it


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_transformers(module: str) -> None:
    code = f"import {module}, sys; print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_one_name_has_one_meaning() -> None:
    """Whoever searches for a function or a class of the package finds one; `main` is what a command is entered by."""
    found: dict[str, list[str]] = {}
    for file in MODULES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in found.items() if len(files) > 1 and name != "main"} == {}


def test_the_cache_is_keyed_by_all_code_that_encodes() -> None:
    folder, known, seen = ROOT / "ds_sft/data", ["build"], set[str]()
    while known:
        name = known.pop()
        seen.add(name)
        modules = {m.split(".")[1] for m in imports_of(folder / f"{name}.py") if m.startswith("data.")}
        known += modules - seen
    key = (folder / "store.py").read_text(encoding="utf-8").partition("def settings_key")[2]
    assert {name for name in seen if f'"{name}"' not in key} == set()


# What says which rank of which launch a process is; beside it, by file, what else is asked of the environment or put
# into it: what a user may set for a feature, and what libraries are told.
LAUNCH = PACKAGE / "ranks/launch.py"
OF_LAUNCHERS = re.compile(
    r"(SLURM|TORCHELASTIC|ACCELERATE|PMI|OMPI|MASTER)_\w*|((LOCAL|NODE|CROSS)_)?RANK|(LOCAL_)?WORLD_SIZE|LOCAL_SIZE"
)
ENVIRONMENT = {
    "checkpoints/requeue.py": {"DS_SFT_MAX_STALLS"},
    "checkpoints/universal.py": {"TORCH_FORCE_WEIGHTS_ONLY_LOAD"},
    "commands/doctor_checks.py": {"GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE"},
    "commands/doctor_facts.py": {"CUDA_VISIBLE_DEVICES"},
    "data/store.py": {"DS_SFT_CACHE", "XDG_CACHE_HOME"},
    "data/encode.py": {"TOKENIZERS_PARALLELISM"},
    "engine/builds.py": {"TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"},
    "engine/lint.py": {"CXX"},
    "export/verify.py": {"PYTHONPATH"},
    "plan/source.py": {"HF_HUB_OFFLINE"},
    "ranks/devices.py": {
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    },
    "ranks/network.py": {"DS_SFT_CONNECT_SECONDS"},
    "ranks/stop.py": {"DS_SFT_STOP_FILE"},
    "tracking/integrations.py": {"WANDB_MODE", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"},
    "tracking/swanlab_run.py": {"SWANLAB_INTERACTIVE"},  # and SWANLAB_PROJECT, _PROJ_NAME and _MODE
}


def test_one_file_reads_what_launchers_say() -> None:
    """Everybody else asks `ranks/launch.py`, so that a launcher is understood in one way."""
    found = {str(file.relative_to(PACKAGE)): words_of(file) for file in MODULES}
    assert [file for file, words in found.items() if any(map(OF_LAUNCHERS.fullmatch, words))] == ["ranks/launch.py"]


def test_what_else_is_asked_of_the_environment() -> None:
    found = {str(file.relative_to(PACKAGE)): variables_of(file) for file in MODULES if file != LAUNCH}
    assert {file: names for file, names in found.items() if names} == ENVIRONMENT


def words_of(file: Path) -> set[str]:
    """All that stands in quotes alone."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def variables_of(file: Path) -> set[str]:
    """Names that are asked of `os.environ` or a copy of it, or put into it."""
    asked: list[ast.expr] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("os.environ", "env"):
            asked.append(node.slice)
        elif isinstance(node, ast.Call) and re.fullmatch(r"(os\.environ|env)\.\w+|os\.getenv", ast.unparse(node.func)):
            asked += node.args[:1]
    return {node.value for node in asked if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_linters_are_silent(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.name)
def test_engine_configs_leave_sizes_to_the_trainer(file: Path) -> None:
    engine = json.loads(file.read_text(encoding="utf-8"))
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    assert {engine[key] for key in sizes} == {engine["bf16"]["enabled"], engine["fp16"]["enabled"]} == {"auto"}
    zero = engine["zero_optimization"]
    assert zero["stage"] == int(file.name[4])
    assert ("offload_optimizer" in zero) == ("offload" in file.name)
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True  # without it there is no final model


def requirements(*without: str) -> list[Requirement]:
    """What setup.cfg asks for, its extras too."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = [text for name, text in setup["options.extras_require"].items() if name not in without]
    lines = [line for text in (setup["options"]["install_requires"], *extras) for line in text.splitlines()]
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pins(file: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(encoding="utf-8"), re.M)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_every_pinned_version_satisfies_the_lower_bound() -> None:
    pinned = pins("constraints.txt")
    assert "torch" not in pinned, "who installs with this file keeps the PyTorch that is there"
    pinned |= dict(re.findall(r"^TORCH := (torch)==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert len(requirements()) >= 15
    for requirement in requirements():
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} but constraints.txt has {version}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """All that a user installs, and the tests; the linters run with the pinned versions alone."""
    pinned = pins("constraints-oldest.txt")
    for requirement in requirements("dev", "docs"):
        (lower,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert Version(version) == Version(lower), f"{requirement} but constraints-oldest.txt has {version}"


def test_what_is_imported_is_a_requirement() -> None:
    """In the wheel's own list: the environments of these tests have more than that brings."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    named = {re.split("[<>=[]", line)[0] for text in lists for line in text.splitlines()}
    known = {name.replace("-", "_") for name in (*named, *PACKAGES)}
    known |= {"ds_sft", "yaml", "triton"}  # yaml is pyyaml's; torch brings triton, where there is a GPU for it
    imported = {name for file in MODULES for name in packages_of(file)}
    assert imported - sys.stdlib_module_names - known == set()


def packages_of(file: Path) -> set[str]:
    """The packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return found


def test_make_installs_what_the_demo_asks_for() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert tuple(re.search(r"^DEMO := (.*)$", makefile, re.M)[1].split()) == PACKAGES


def targets() -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()


def test_make_says_what_each_target_and_each_variable_is_for() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assigned = {
        *re.findall(r"^(?:export |define )?([A-Z_]+)(?: :?= |$)", makefile, re.M),
        "CURDIR",
        "MAKEFILE_LIST",
    }  # two: of make
    given = {*re.findall(r"\$\(([A-Z_]+)\)", makefile)} - assigned | {"LANES"}  # LANES= is what a user may say
    asked = [["make", "--no-print-directory", *target] for target in ([], ["help"])]  # `make test` runs this
    said = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for command in asked]
    assert said[0] == said[1]  # without a target nothing is installed
    lines = [line.split(maxsplit=2) for line in said[0].splitlines()]
    assert [name for make, name, _ in lines[: len(targets())] if make == "make"] == targets()
    assert sorted(line[0] for line in lines[len(targets()) :]) == sorted(f"{name}=" for name in given)


WORKFLOW = ROOT / ".github/workflows/ci.yml"


def test_hosted_jobs_run_what_anybody_can_run_here() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    asked = {tuple(shlex.split(step["run"])[:2]) for job in jobs for step in job["steps"] if "run" in step}
    assert asked - {("make", name) for name in targets()} == {(".ci/run",)}
    checks = [name for name in targets() if name.startswith(("test-", "lint", "docs")) and name != "test-gpu"]
    assert {name for name in checks if ("make", name) not in asked} == set()


def test_hosted_jobs_have_a_python_that_is_supported() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    supported = SpecifierSet(setup["options"]["python_requires"])
    versions = re.findall(r"(?<![\d.])3\.\d+", WORKFLOW.read_text(encoding="utf-8"))
    assert len(versions) >= 3
    assert [version for version in versions if version not in supported] == []


def test_hosted_jobs_may_only_read_and_keep_what_pip_has_loaded() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    for job in workflow["jobs"].values():
        checkout, cache, *runs = job["steps"]
        assert re.fullmatch(r"actions/checkout@v\d+", checkout["uses"])
        assert re.fullmatch(r"actions/cache@v\d+", cache["uses"])
        assert cache["with"]["path"] == ".cache/pip"  # PIP_CACHE_DIR of the Makefile
        assert "hashFiles('constraints" in cache["with"]["key"]
        assert [list(step) for step in runs] == [["run"]] * len(runs)
        assert 0 < job["timeout-minutes"] <= 60


def test_the_tour_names_every_module() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A tour of the code")[2]
    rooms = dict(re.findall(r"^\*\*`(\w+)/`\*\*(.*?)(?=^\*\*`|^## )", tour, re.M | re.S))
    assert set(rooms) == {file.parent.name for file in MODULES} - {"ds_sft"}
    for file in MODULES:
        where = rooms.get(file.parent.name, tour)
        assert file.name.startswith("__") or f"`{file.name}`" in where, f"{file.relative_to(ROOT)} has no word there"
