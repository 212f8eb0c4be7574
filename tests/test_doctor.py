"""`ds-sft doctor`: what each rank sees, and what is made of it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_sft.cli import main
from ds_sft.commands.doctor_checks import Check, compare_nodes, judge_exchange, judge_network
from ds_sft.commands.doctor_facts import look_around
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.network import Exchange, Network, stdout_to_stderr
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import BIN, free_port, run
from tests.test_house import ROOT


@pytest.fixture
def config(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", questions_and_answers(8))
    keys = {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "output_dir": "out",
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "save_total_limit": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return load_config(["--config", "run.yaml"])


@pytest.fixture
def nodes(config: Config) -> list[dict[str, Any]]:
    """What two nodes of one rank see, if they are alike."""
    first = look_around(config, Launch(launcher="slurm", world_size=2))
    first |= {"host": "node1", "address": {"address": "10.0.0.1"}}
    second = {**copy.deepcopy(first), "rank": 1, "host": "node2", "address": {"address": "10.0.0.2"}}
    return [first, second]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_two_nodes_alike(nodes: list[dict[str, Any]], config: Config) -> None:
    checks = compare_nodes(nodes, config, 2)
    assert {check.status for check in checks} == {"pass"}
    assert not any(check.remedy for check in checks)
    assert by_name(checks)["names"].value == "node1 10.0.0.1, node2 10.0.0.2"


def change(path: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Set a fact of the second node."""

    def apply(nodes: list[dict[str, Any]]) -> None:
        *parents, last = path.split(".")
        place = nodes[1]
        for name in parents:
            place = place[name]
        place[last] = value

    return apply


@pytest.mark.parametrize(
    ("fault", "name", "status", "value"),
    [
        (change("code.hash", "beef"), "code", "fail", "on node1, beef on node2"),
        (change("config.max_length", 7), "config", "fail", "max_length: 2048 on node1, 7 on node2"),
        (change("versions.torch", "2.0"), "packages", "fail", "on node1, 2.0 on node2"),
        (change("device.trouble", "local rank 1 finds 1 GPUs"), "device", "fail", "finds 1 GPUs (on node2)"),
        (change("device.kind", "cuda"), "device", "fail", "GPUs on some nodes only"),
        (change("model", {"trouble": "x: no such folder"}), "model", "fail", "x: no such folder (on node2)"),
        (change("model", {"download": True}), "model", "fail", "is not on node2"),  # HF_HUB_OFFLINE in tests
        (change("data", {"trouble": "t: no such file"}), "data", "fail", "t: no such file (on node2)"),
        (change("data.bytes", {"train.jsonl": 1}), "data", "fail", "on node1, 1 on node2"),
        (change("output", {"trouble": "out: Permission denied"}), "output", "fail", "Permission denied (on node2)"),
        (change("output.free", 3 << 20), "disk", "warn", "room for 1 checkpoints of 1."),
        (change("output.free", 1 << 20), "disk", "fail", "1.0 MiB free: room for 0 checkpoints"),
        (change("address", {"address": "127.0.1.1"}), "names", "fail", "the name of node2 stands for 127.*"),
        (change("address", {"trouble": "does not resolve"}), "names", "fail", "does not resolve (on node2)"),
    ],
)
def test_a_difference_is_named_with_its_remedy(
    nodes: list[dict[str, Any]], config: Config, fault: Any, name: str, status: str, value: str
) -> None:
    fault(nodes)
    checks = by_name(compare_nodes(nodes, config, 2))
    found = checks.pop(name)
    assert found.status == status
    assert value in found.value
    assert found.remedy
    assert {check.status for check in checks.values()} == {"pass"}


def test_the_code_is_also_what_deepspeed_has_names_for(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes with wheels that differ in zero2.json alone would train differently."""

    def seen() -> Any:
        return look_around(config, Launch(launcher="python"))["code"]["hash"]

    package = tmp_path / "ds_sft"
    shutil.copytree(ROOT / "ds_configs", package / "ds_configs")
    monkeypatch.setattr("ds_sft.commands.doctor_facts.PACKAGE", package)
    monkeypatch.setattr("ds_sft.commands.doctor_facts.CONFIGS", package / "ds_configs")
    before = seen()
    assert seen() == before
    (package / "ds_configs" / "zero2.json").write_text("{}", encoding="utf-8")
    assert seen() != before


def test_a_named_card_needs_no_name(
    nodes: list[dict[str, Any]], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes[1]["address"] = {"address": "127.0.1.1"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert by_name(compare_nodes(nodes, config, 2))["names"] == Check("names", "pass", "GLOO_SOCKET_IFNAME=ib0")


def network(**changes: Any) -> Network:
    keys = {"address": "node1", "port": 1, "backend": "nccl", "world_size": 2, "latency": 1e-5, "bandwidth": 25e9,
            "clock_skew": 0.0, "shared": True}  # fmt: skip
    return Network(**{**keys, **changes})


def test_what_zero_spends_communicating(nodes: list[dict[str, Any]], config: Config) -> None:
    """1e9 parameters in bfloat16, 4 micro batches, 2 ranks, 1 GB/s: 1 s each time the weights' size is moved.

    ZeRO-2 all-reduces each micro batch, which moves it twice, and gathers the weights: 2 x 4 + 1, as `plan` has it.
    """
    nodes[0]["model"]["size"] = {"parameters": 10**9, "embedding": 0, "tied": False}
    checks = by_name(judge_network(network(bandwidth=1e9), nodes, config))
    assert checks["ZeRO"].value.startswith(
        "communication takes about 9 s a step under ZeRO-2, 12 s under ZeRO-3 (4 micro"
    )
    assert checks["output"].value == "shared by the nodes"


# A row of 2,048 tokens of the tests' model, between 2 ranks: 2 layers, of a token 64 numbers of queries, 2 x 32 of keys
# and values, 64 of what attention made of them, 2 bytes each; forward, forward again (checkpointing) and backward. A
# rank has half of the tokens and sends half of that.
A_ROW = 2 * 3 * (64 + 2 * 32 + 64) * 2 * 2048 / 2 / 2


@pytest.mark.parametrize(
    ("of_ranks", "changes", "status", "value", "remedy"),
    [
        (
            [0, 0, 1, 1],
            {"inside": A_ROW / 2},
            "pass",
            "groups of 2 ranks, each in one node: 0.10 ms a round trip, 0.00 GB/s; "
            "a row of 2,048 tokens waits about 2 s",
            "",
        ),
        (
            [0, 0, 0, 1],
            {"inside": 5e9, "between": 0.25e9},
            "warn",
            "1 of 2 groups of 2 ranks spans nodes (ranks 2-3): 0.10 ms a round trip, 0.25 GB/s, 5.00 GB/s inside a node"
            "; a row of 2,048 tokens waits about 0.0047 s instead of 0.00024 s",
            "a node has 1 to 3 ranks: start a multiple of 2 on each",
        ),
        (
            [0, 1],
            {"between": 0.25e9},
            "warn",
            "1 of 1 groups of 2 ranks spans nodes (ranks 0-1): 0.10 ms a round trip, 0.25 GB/s; "
            "a row of 2,048 tokens waits about 0.0047 s",
            "a node has 1 rank: start a multiple of 2 on each",
        ),
    ],
)
def test_what_is_made_of_an_exchange(
    config: Config, of_ranks: list[int], changes: dict[str, float], status: str, value: str, remedy: str
) -> None:
    exchange = Exchange(**{"nodes": of_ranks, "size": 2, "latency": 1e-4, "inside": None, "between": None, **changes})
    assert judge_exchange(exchange, config) == Check("exchange", status, value, remedy)


def test_an_exchange_of_more(config: Config) -> None:
    """Of four ranks each has a quarter and sends three quarters of it, with twice the key heads; float32 is twice as
    wide, and without checkpointing there is one forward."""
    exchange = Exchange(nodes=[0] * 4, size=4, latency=0.0, inside=A_ROW, between=None)
    keys = {"max_length": 4096, "bf16": False, "activation_checkpointing": False}
    config = replace(config, max_length=4096, training={**config.training, **keys})
    seconds = 2 * (3 / 4 / 4) / (1 / 2 / 2) * (64 + 2 * 64 + 64) / (64 + 2 * 32 + 64) * 2 * 2 / 3
    assert judge_exchange(exchange, config).value.endswith(f"; a row of 4,096 tokens waits about {seconds:.2g} s")


def test_an_exchange_of_a_model_without_a_plan(config: Config, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    exchange = Exchange(nodes=[0, 0], size=2, latency=1e-4, inside=1e9, between=None)
    config = replace(config, model_name_or_path=str(tmp_path / "other"))
    assert judge_exchange(exchange, config).value.endswith("each in one node: 0.10 ms a round trip, 1.00 GB/s")


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({}, "collectives", "pass"),
        ({"bandwidth": 0.1e9}, "collectives", "warn"),
        ({"bandwidth": 0.1e9, "backend": "gloo"}, "collectives", "pass"),  # CPUs: not what anybody waits for
        ({"clock_skew": 1.5}, "clocks", "warn"),
        ({"clock_skew": 0.5}, "clocks", "pass"),
    ],
)
def test_slow_networks_and_wrong_clocks(
    nodes: list[dict[str, Any]], config: Config, changes: dict[str, Any], name: str, status: str
) -> None:
    found = by_name(judge_network(network(**changes), nodes, config))[name]
    assert (found.status, bool(found.remedy)) == (status, status != "pass")


def test_gpus_that_torch_does_not_see(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    device = look_around(config, Launch(launcher="slurm"))["device"]
    assert device["trouble"].startswith("Slurm gave 8 GPUs, torch ")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """One that nobody else has, for runs of this process alone."""
    found = free_port()
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


@pytest.mark.usefixtures("port")
def test_on_one_box(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "run.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines if line.startswith("pass")]
    assert names == ["code", "config", "packages", "device", "model", "data", "output", "disk", "names",
                     "network", "collectives"]  # fmt: skip
    assert lines[-1] == "0 fail, 0 warn, 11 pass"
    assert main(["doctor", "--json", "run.yaml"]) == 0
    assert [check["name"] for check in json.loads(capsys.readouterr().out.splitlines()[-1])] == names


@pytest.mark.parametrize(("launcher", "status"), [({}, "warn"), ({"RANK": "0", "WORLD_SIZE": "1"}, "fail")])
def test_a_port_that_is_taken(
    config: Config, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    launcher: dict[str, str], status: str,
) -> None:  # fmt: skip
    """The other checks are made all the same. A process that no launcher started trains without one."""
    for name, value in {**launcher, "LOCAL_RANK": "0"}.items() if launcher else ():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", port)):
        assert main(["doctor", "run.yaml"]) == int(status == "fail")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{status}  network   rank 0 on ") and f"127.0.0.1:{port}: " in line for line in lines)
    assert sum(line.startswith("pass  ") for line in lines) == 9


def test_a_name_that_does_not_resolve(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.gethostbyname", fail)
    assert main(["doctor", "run.yaml"]) == 1
    assert "fail  names     its own name does not resolve: Name or service not known" in capsys.readouterr().out


@pytest.mark.usefixtures("config", "port")
def test_the_command_ends_by_itself(tmp_path: Path) -> None:
    """No process, thread or process group of the examination keeps it."""
    done = run([str(BIN / "ds-sft"), "doctor", "run.yaml"], cwd=tmp_path)
    assert done.code == 0, done.output


@pytest.mark.parametrize("wrong", ["abc", "0", "-1", "nan", ""])
def test_patience_that_is_no_number(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    monkeypatch.setenv("DS_SFT_CONNECT_SECONDS", wrong)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "run.yaml"])
    assert ended.value.code == 2
    said = f"ds_sft: error: environment: DS_SFT_CONNECT_SECONDS={wrong!r}: expected seconds, a number above 0\n"
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("config")
def test_a_port_that_is_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "run.yaml"])
    assert ended.value.code == 2
    said = "ds_sft: error: environment: MASTER_PORT='http': expected the number of a free port of the first node\n"
    assert capsys.readouterr().err == said


def test_each_part_that_is_wrong_here(
    config: Config, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    write_rows(tmp_path / "bad.jsonl", ["{"])
    shutil.copytree(model_dir, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:-1])
    for key, value, said in (
        ("output_dir", "file/out", "fail  output    file/out: Not a directory (on "),
        ("train_file", "absent.jsonl", "fail  data      absent.jsonl: no such file"),
        ("train_file", "bad.jsonl", "fail  data      bad.jsonl:1: "),
        ("model_name_or_path", "./absent", "fail  model     ./absent: no such folder (the current directory is "),
        ("model_name_or_path", "./cut", "fail  model     cut/model.safetensors: is cut off: "),
    ):
        assert main(["doctor", "run.yaml", f"--{key}", value]) == 1
        assert said in capsys.readouterr().out


def test_rows_are_read_while_there_is_time(
    config: Config, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken row is found wherever it stands; without time the first of each file is read, which is said."""
    write_rows(tmp_path / "bad.jsonl", [*questions_and_answers(5000), "{"])
    files = ["--train_file", "bad.jsonl", "--eval_file", "train.jsonl"]
    assert main(["doctor", "run.yaml", *files]) == 1
    assert "  bad.jsonl:5001: not JSON: " in capsys.readouterr().out
    assert main(["doctor", "run.yaml", *files, "--on_bad_row", "skip"]) == 0
    assert ", all 5,009 rows read\n" in capsys.readouterr().out
    monkeypatch.setattr("ds_sft.commands.doctor_facts.READ_SECONDS", -1)
    assert main(["doctor", "run.yaml", *files]) == 0
    assert ", only 2 rows read in time, at least the first of each file\n" in capsys.readouterr().out


def test_a_mistake_in_the_config_is_2(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, meant in (("--max_lenght=7", "--max_lenght: unknown key: did you mean --max_length?"),
                         ("--jsn", "--jsn: unknown key: did you mean --json?")):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "run.yaml", wrong])
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"ds_sft: error: {meant}\n"


@pytest.mark.usefixtures("port")
def test_one_process_sees_one_rank_of_a_group(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "run.yaml", "--sequence_parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert "warn  groups       sequence_parallel: 2: of a group only one rank is here\n" in said
    assert "-> torchrun --nproc_per_node 2 -m ds_sft doctor CONFIG measures what they exchange\n" in said


@pytest.mark.usefixtures("port")
def test_a_model_whose_rows_cannot_be_shared(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "run.yaml", "--sequence_parallel", "3"]) == 1
    said = capsys.readouterr().out
    assert "fail  groups    sequence_parallel: 3: Qwen3ForCausalLM has 4 heads, " in said
    assert main(["doctor", "run.yaml", "--sequence_parallel", "3", "--model_name_or_path", "./absent"]) == 1
    assert " groups    sequence_parallel: 3: of a group only one rank is here\n" in capsys.readouterr().out


def test_ranks_that_are_no_whole_groups(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said as the run would say it, before anything is looked at."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "run.yaml", "--sequence_parallel", "2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("ds_sft: error: sequence_parallel: 2: the run has 3 ranks, ")


@pytest.mark.distributed
def test_between_two_ranks(config: Config, tmp_path: Path) -> None:
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    words = ["-m", "ds_sft", "doctor", "--json", "run.yaml", "--sequence_parallel", "2"]
    done = run([*command, *words], cwd=tmp_path)
    assert done.code == 0, done.output
    checks = json.loads(re.findall(r"\[\{.*\}\]", done.output)[0])
    assert {check["status"] for check in checks} == {"pass"}
    assert [check["name"] for check in checks][-5:] == ["network", "collectives", "exchange", "ZeRO", "clocks"]
    assert checks[-3]["value"].startswith("groups of 2 ranks, each in one node: ")
    assert not list((tmp_path / "out").iterdir())


def test_a_greeting_is_not_among_what_programs_read(capfd: pytest.CaptureFixture[str]) -> None:
    """Gloo of torch 2.10 writes to stdout past Python; `doctor --json` is read."""
    with stdout_to_stderr():
        os.write(1, b"[Gloo] Rank 0 is connected\n")
    os.write(1, b"[]\n")
    assert tuple(capfd.readouterr()) == ("[]\n", "[Gloo] Rank 0 is connected\n")
