"""A user's own code, from outside the package: modules of docs/extend.md and wrong ones, named in a real YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from ds_sft.checkpoints.identity import changes, changes_in_words, identity
from ds_sft.config.extension import find_own_code, load, source_hash
from ds_sft.config.keys import DATA_FORMATS, Config
from ds_sft.config.read import load_config
from ds_sft.data.batch import collate_flat
from ds_sft.data.dataset import load_data
from ds_sft.data.shapes import SHAPES
from ds_sft.errors import UserError
from ds_sft.model import own_attention
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.own_attention import register_attention, try_attention
from ds_sft.model.quantized import require_bitsandbytes
from ds_sft.ranks.launch import Launch
from ds_sft.train import prepare_own_code
from ds_sft.training.callbacks import make_callbacks, restore_states
from ds_sft.training.optimizer import optimizer_options, own_optimizer
from tests.conftest import write_rows
from tests.distributed.harness import write_yaml
from tests.own_code import TICKETS, importable, write_modules
from tests.test_attention import LENGTHS, make_rows, padded
from tests.test_attention import make as make_model

ALONE = Launch(launcher="python")
WRONG = """
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from my_optimizer import SignSGD

def two(a, b): ...
def kwargs(**given): ...
def fails(row): raise KeyError("reply")
def refuses(row): raise ValueError("no reply,\\n  no row")
def returns_text(row): return "text"
def no_callback(): return 3
def broken(): raise RuntimeError("no such file")
class Empty: ...
class Model(torch.nn.Module): ...
def ends(row): raise SystemExit(3)
number = 3

class FewWords(TrainerCallback):
    def on_log(self, args, state, control, logs=None): ...
class NoControl(TrainerCallback):
    def on_step_end(self, args, state): ...
class OtherState(TrainerCallback, ExportableState):
    def state(self): return {"below": 1}
class NoState(TrainerCallback, ExportableState):
    def state(self): return self.below

class Deaf:
    def start(self, keys): ...
    def log(self, metrics, step): ...
    def finish(self, state, error): ...
class Textless(Deaf):
    def start(self, keys, *, resumed): ...
    def log_predictions(self, texts): ...
class Whole(Textless):
    log_predictions = staticmethod(lambda texts, step: None)
class Constant(Whole):
    log = 3

class Strict(SignSGD):
    def __init__(self, params, lr, betas=(0.9, 0.95), nesterov=False):
        super().__init__(params, lr, momentum=betas[0])
"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Config]]:
    """A configuration with these keys, in a folder with the modules of the page and wrong ones."""
    write_modules(tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "failing.py").write_text("\n1 / 0\n")
    (tmp_path / "misspelt.py").write_text("def f(:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    write_rows(tmp_path / "tickets.jsonl", TICKETS[:3])
    monkeypatch.chdir(tmp_path)

    def build(**keys: Any) -> Config:
        common = {"model_name_or_path": "m", "train_file": "tickets.jsonl", "output_dir": "out", "cache_dir": "cache",
                  "report_to": "none"}  # fmt: skip
        return load_config([str(write_yaml(tmp_path / "run.yaml", common | keys))])

    with importable(tmp_path):
        yield build


def test_what_the_page_shows_is_taken(read: Any) -> None:
    callbacks = [{"my_callbacks:StopBelow": {"bound": 1.5}}, "transformers:EarlyStoppingCallback"]
    config = read(data_format="my_rows:tickets", report_to="my_tracker:Lines", callbacks=callbacks, val_size=1,
                  metric_for_best_model="loss", attn_implementation="my_attention:by_rows",
                  optim="my_optimizer:SignSGD", optim_args="momentum=0.95")  # fmt: skip
    first, second = prepare_own_code(config, ALONE)
    assert (type(first).__name__, first.bound, first.times) == ("StopBelow", 1.5, 3)
    assert isinstance(second, EarlyStoppingCallback)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"data_format": "nowhere:f"},
            "data_format: nowhere:f: no module nowhere: put its folder into PYTHONPATH, or start in it (here: ",
        ),
        ({"data_format": "my_rows:tickts"}, "/my_rows.py has no tickts: did you mean tickets?"),
        (
            {"data_format": "failing:f"},
            "failing:f: importing failing ends in ZeroDivisionError: division by zero (failing.py:2)",
        ),
        ({"data_format": "script:f"}, "importing script ends in SystemExit: 0 (script.py:2)"),
        ({"data_format": "misspelt:f"}, "importing misspelt ends in SyntaxError: invalid syntax (misspelt.py:1)"),
        ({"data_format": "wrong:number"}, "wrong:number: no function or class but int: it is called as number(row)"),
        ({"data_format": "wrong:two"}, "wrong:two(a, b): missing a required argument: 'b': it is called as two(row)"),
        (
            {"data_format": "my_rows:tickets", "data_fields": {"question": "subject"}},
            "reads a row's own fields: leave data_fields out",
        ),
        (
            {"report_to": "wrong:Empty"},
            "report_to: wrong:Empty: it has no method start, log, finish: see docs/extend.md",
        ),
        (
            {"report_to": ["swanlab", "tensorbord"]},
            "tensorbord: expected none, all, my.module:Tracker, or any of swanlab, azure_ml,",
        ),
        ({"report_to": "tensorbord"}, "wandb; did you mean tensorboard?"),
        (
            {"report_to": "clearml"},
            "report_to: clearml: it is not installed here: pip install clearml, or leave it out",
        ),
        (
            {"callbacks": ["my_callbacks:StopBelow"]},
            "missing a required argument: 'bound': it is called as StopBelow()",
        ),
        ({"callbacks": [{"my_callbacks:StopBelow": {"bund": 1}}]}, "it is called as StopBelow(bund=...)"),
        (
            {"callbacks": ["wrong:no_callback"]},
            "callbacks: wrong:no_callback: expected a transformers.TrainerCallback, found int",
        ),
        (
            {"callbacks": ["wrong:broken"]},
            "callbacks: wrong:broken: making it ends in RuntimeError: no such file (wrong.py:13)",
        ),
        (
            {"callbacks": [{"my_callbacks:StopBelow": {"bound": 1}}] * 2},
            "callbacks: 2 with a state are called StopBelow",
        ),
        ({"callbacks": ["transformers:EarlyStoppingCallback"]}, "nothing is evaluated: write eval_file (or val_size)"),
        (
            {"callbacks": ["transformers:EarlyStoppingCallback"], "val_size": 1},
            "by which number? write metric_for_best_model: loss too",
        ),
        (
            {"callbacks": ["wrong:FewWords"]},
            "wrong:FewWords.on_log(args, state, control, logs=None): got an unexpected keyword argument 'model': it is "
            "called as FewWords.on_log(args, state, control, model=...",
        ),
        (
            {"callbacks": ["wrong:NoControl"]},
            "NoControl.on_step_end(args, state): too many positional arguments: it is",
        ),
        (
            {"callbacks": ["wrong:OtherState"]},
            'wrong:OtherState.state() returned {\'below\': 1}: expected {"args": {...}, "attributes": {...}}',
        ),
        (
            {"callbacks": ["wrong:NoState"]},
            "wrong:NoState.state() ends in AttributeError: 'NoState' object has no attribute 'below' (wrong.py:",
        ),
        (
            {"report_to": "wrong:Deaf"},
            "report_to: wrong:Deaf.start(keys): got an unexpected keyword argument 'resumed': it is called as "
            "Deaf.start(keys, resumed=...)",
        ),
        ({"report_to": "wrong:Textless"}, "it is called as Textless.log_predictions(texts, step)"),
        (
            {"report_to": "wrong:Constant"},
            "wrong:Constant.log: no function or class but int: it is called as Constant.log(metrics, step)",
        ),
        (
            {"attn_implementation": "wrong:two"},
            "as two(module, query, key, value, attention_mask, scaling=..., dropout=..., sliding_window=...)",
        ),
        (
            {"optim": "wrong:Model"},
            "optim: wrong:Model: expected a class, a torch.optim.Optimizer, found <class 'wrong.Model'>",
        ),
        (
            {"optim": "my_optimizer:SignSGD", "optim_args": "beta=0.9"},
            "it is called as SignSGD(params, lr=..., beta=...)",
        ),
        (
            {"optim": "my_optimizer:SignSGD", "optim_args": "momentum"},
            "optim_args: momentum: expected name=value,name=value",
        ),
        (
            {"optim": "my_optimizer:SignSGD", "optim_args": "momentum=x"},
            "optim_args: momentum=x: expected a number, as its default is: 0.9",
        ),
        (
            {"optim": "wrong:Strict", "optim_args": "nesterov=no"},
            "optim_args: nesterov=no: expected true or false, as its default is: False",
        ),
        (
            {"optim": "wrong:Strict", "optim_args": "betas=0.9"},
            "wrong:Strict: making it with lr=0.0001, betas=0.9 ends in TypeError: 'float' object is not subscriptable "
            "(wrong.py:",
        ),
        (
            {"optim": "torch.optim:SGD", "optim_args": "momentum=-1"},
            "making it with lr=0.0001, momentum=-1 ends in ValueError: Invalid momentum value: -1",
        ),
    ],
)
def test_what_cannot_be_had_is_one_line(read: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare_own_code(read(**keys), ALONE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tracker_may_be_more_than_a_class_of_methods(read: Any) -> None:
    for name in ("wrong:Whole", "wrong:broken"):  # a static method; a function that makes one, when the run begins
        assert prepare_own_code(read(report_to=name), ALONE) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"data_format": "nowhere:f"},
        {"train_file": [{"path": "tickets.jsonl", "data_format": "nowhere:f"}]},
        {"eval_file": [{"path": "tickets.jsonl", "data_format": "nowhere:f"}]},
        {"report_to": ["swanlab", "nowhere:f"]},
        {"callbacks": [{"nowhere:f": {"a": 1}}]},
        {"attn_implementation": "nowhere:f"},
        {"optim": "nowhere:f"},
    ],
    ids=str,
)
def test_code_that_is_nowhere_is_missed_before_any_library_is_imported(read: Any, keys: dict[str, Any]) -> None:
    """`train.py` asks before its heavy imports; test_house.py holds that this module has none."""
    with pytest.raises(UserError, match=r": nowhere:f: no module nowhere: put its folder into PYTHONPATH"):
        find_own_code(read(**keys))
    assert find_own_code(read(data_format="my_rows:tickets", report_to="tensorboard")) is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"callbacks": "Thing"}, "callbacks: expected each to be my.module:Thing, or {my.module:Thing: {argument: 1}}"),
        ({"callbacks": [{"a:b": 3}]}, '{"a:b": 3} is neither'),
        ({"data_format": "alpacca"}, "prompt_completion, or my.module:thing, found 'alpacca': did you mean alpaca?"),
        ({"optim": "my module:f"}, "or my.module:thing, found 'my module:f'"),
        ({"restore_callback_states_from_checkpoint": True}, "callbacks with a state go on from it in any case"),
        ({"attn_implementation": "a:b", "sequence_parallel": 2}, "attn_implementation: a:b: only this package's"),
    ],
)
def test_names_of_another_form_are_found_in_the_file(read: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=r"run\.yaml:\d+: ") as caught:
        read(**keys)
    assert said in str(caught.value)


# ---- Shapes of rows


def test_every_name_of_a_shape_has_an_entry() -> None:
    assert set(DATA_FORMATS) == {"auto", *SHAPES}


def test_rows_by_a_function_are_those_of_its_messages(read: Any, tokenizer: Any, tmp_path: Path) -> None:
    own = load_data(read(data_format="my_rows:tickets"), tokenizer, ALONE).train
    rows = [{"question": f"{row['subject']}\n\n{row['body']}", "answer": row["reply"]} for row in TICKETS[:3]]
    write_rows(tmp_path / "plain.jsonl", rows)
    plain = load_data(read(train_file="plain.jsonl"), tokenizer, ALONE).train
    assert [row["input_ids"] for row in own] == [row["input_ids"] for row in plain]
    assert [row["labels"] for row in own] == [row["labels"] for row in plain]
    of_one_file = read(train_file=[{"path": "tickets.jsonl", "data_format": "my_rows:tickets"}, "plain.jsonl"])
    assert len(load_data(of_one_file, tokenizer, ALONE).train) == 6


@pytest.mark.parametrize(
    ("data_format", "said"),
    [
        ("wrong:refuses", "tickets.jsonl:1: no reply, no row (on_bad_row: skip"),
        ("my_rows:tickets", "tickets.jsonl:4: the reply is empty; expected a text (on_bad_row: skip"),
        ("wrong:fails", "tickets.jsonl:1: wrong:fails ended in KeyError: 'reply' (wrong.py:9) (on_bad_row: skip"),
        ("wrong:ends", "tickets.jsonl:1: wrong:ends ended in SystemExit: 3 (wrong.py:"),
        ("wrong:returns_text", 'tickets.jsonl:1: wrong:returns_text returned a string: "text"; expected a list of'),
    ],
)
def test_a_row_that_a_function_refuses_is_a_bad_row(
    read: Any, tokenizer: Any, tmp_path: Path, data_format: str, said: str
) -> None:
    write_rows(tmp_path / "tickets.jsonl", [*TICKETS[:3], {**TICKETS[0], "reply": " "}])
    with pytest.raises(UserError) as caught:
        load_data(read(data_format=data_format), tokenizer, ALONE)
    assert str(caught.value).startswith(said)
    if data_format == "my_rows:tickets":
        data = load_data(read(data_format=data_format, on_bad_row="skip"), tokenizer, ALONE)
        assert data.report["train"]["rows_dropped"] == {"refused by my_rows:tickets": 1}


def test_a_changed_function_encodes_anew(
    read: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in ("reading and encoding", "already encoded"):
        load_data(read(data_format="my_rows:tickets"), tokenizer, ALONE)
        assert expected in capsys.readouterr().out
    (tmp_path / "my_rows.py").open("a").write("\n# another\n")
    load_data(read(data_format="my_rows:tickets"), tokenizer, ALONE)
    assert "reading and encoding" in capsys.readouterr().out


def test_a_function_may_return_tools_and_a_system_turn(read: Any, tmp_path: Path) -> None:
    from ds_sft.data.shapes import to_messages

    (tmp_path / "mine.py").write_text(
        "def whole(row):\n"
        "    return {'system': 'S', 'messages': [{'role': 'user', 'content': row['q']},\n"
        "            {'role': 'assistant', 'content': 'a', 'train': True}]}\n"
    )
    messages, tools, unread = to_messages({"q": "Q", "other": 1}, "mine:whole", {}, "prompt")
    assert [(message.role, message.content) for message in messages] == [
        ("system", "S"), ("user", "Q"), ("assistant", "a")]  # fmt: skip
    assert (tools, unread) == ([], ())


# ---- Callbacks


class Other(TrainerCallback):
    """One without a state."""


def test_states_of_callbacks_go_into_a_checkpoint_and_come_back(read: Any) -> None:
    config = read(callbacks=[{"my_callbacks:StopBelow": {"bound": 2.0}}])
    (callback,) = make_callbacks(config)
    saved = {"StopBelow": {"args": {"bound": 1.0}, "attributes": {"below": 2}}, "Gone": {"args": {}, "attributes": {}}}
    restore_states([Other(), callback], saved)
    assert (callback.bound, callback.below) == (2.0, 2)  # the arguments are the run's
    new: dict[str, Any] = {"TrainerControl": {}}
    restore_states([Other(), callback], new)  # a checkpoint that does not know it
    assert new == {"TrainerControl": {}, "StopBelow": {"args": {}, "attributes": {"below": 2}}}


# ---- Attention


WITHOUT = """
from my_attention import by_rows

def by_mask(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    assert "row_borders" not in kwargs
    return by_rows(module, query, key, value, attention_mask, scaling, dropout)

HAD = []

def by_borders(module, query, key, value, attention_mask, scaling=None, dropout=0.0, row_borders=None, **kwargs):
    HAD.append((attention_mask is None, row_borders and (row_borders.lengths, row_borders.starts.tolist())))
    return by_rows(module, query, key, value, attention_mask, scaling, dropout, row_borders)
"""


@pytest.mark.parametrize("name", ["mine:by_borders", "mine:by_mask"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_attention_keeps_rows_apart(read: Any, tmp_path: Path, family: str, name: str) -> None:
    (tmp_path / "mine.py").write_text(WITHOUT)
    register_attention(read(attn_implementation=name))
    rows = make_rows()
    model = make_model(family).eval()
    ours = make_model(family, attn_implementation=name).eval()
    assert str(keep_rows_apart(ours, name)) == f"{name} (as attn_implementation says)"
    flat = {key: value for key, value in collate_flat(rows).items() if key in ("input_ids", "position_ids")}
    together = ours(**flat, use_cache=False).logits[0]
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    if name == "mine:by_borders":
        assert load("mine:HAD", "")[0] == (True, (LENGTHS, [0, 5, 28, 29, 69, 76, 84]))
    batch = {key: value for key, value in padded(rows).items() if key != "labels"}
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[seen], alone, atol=1e-5, rtol=1e-4)


WRONG_ATTENTION = """
from torch.nn.functional import scaled_dot_product_attention as attend

def other_axes(module, query, key, value, attention_mask, **kwargs):
    return attend(query, key, value, attn_mask=attention_mask, enable_gqa=True), None

def alone(module, query, key, value, attention_mask, **kwargs):
    return other_axes(module, query, key, value, attention_mask)[0].transpose(1, 2)

def no_groups(module, query, key, value, attention_mask, **kwargs):
    return attend(query, key, value, attn_mask=attention_mask).transpose(1, 2), None

SEEN = []

def look(module, query, key, value, attention_mask, row_borders=None, **kwargs):
    SEEN.append([tuple(states.shape[i] for i in (1, 3)) for states in (query, key, value)])
    SEEN.append({name: value for name, value in kwargs.items() if name not in ("position_ids", "use_cache")})
    return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]) + 0 * value.sum(), None

def grouped(query, key, value, **kwargs):
    return attend(query, key, value, enable_gqa=True, **kwargs).transpose(1, 2), None

def sees_all(module, query, key, value, attention_mask, **kwargs):
    return grouped(query, key, value, attn_mask=attention_mask | attention_mask.mT)

def sees_rows(module, query, key, value, attention_mask, **kwargs):
    return grouped(query, key, value, is_causal=True)

def sees_rows_by_borders(module, query, key, value, attention_mask, row_borders=None, **kwargs):
    return grouped(query, key, value, is_causal=True)

def learns_nothing(module, query, key, value, attention_mask, **kwargs):
    return grouped(query.detach(), key.detach(), value.detach(), attn_mask=attention_mask)
"""
EXPECTED = (
    "expected two, what was attended to, [batch, tokens, heads, head_dim], here [1, 7, 4, 16], and weights or None"
)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other_axes", f"it returned ([1, 4, 7, 16], None): {EXPECTED}"),
        ("alone", f"it returned [1, 7, 4, 16]: {EXPECTED}"),
        ("no_groups", "it ends in RuntimeError: The size of tensor a (4) must match the size of tensor b (2) at "
         "non-singleton dimension 1 (mine.py:11)"),
    ],
)  # fmt: skip
def test_an_attention_is_tried_before_the_model_is_loaded(
    read: Any, tmp_path: Path, model_dir: Path, name: str, said: str
) -> None:
    (tmp_path / "mine.py").write_text(WRONG_ATTENTION)
    config = read(model_name_or_path=str(model_dir), attn_implementation=f"mine:{name}")
    with pytest.raises(UserError) as caught:
        prepare_own_code(config, ALONE)
    assert str(caught.value) == (
        f"attn_implementation: mine:{name}: called with query [1, 4, 7, 16] and key [1, 2, 7, 16] {said}"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sees_all", "a token sees those behind it in its row, which it is to predict"),
        ("sees_rows", "of two rows laid end to end the second sees the first: attention_mask keeps them apart"),
        ("sees_rows_by_borders", "of two rows laid end to end the second sees the first: row_borders say where they "
         "begin"),
        ("learns_nothing", "what it returns has no gradient, so nothing before it would learn"),
    ],
)  # fmt: skip
def test_what_an_attention_sees_is_tried(read: Any, tmp_path: Path, model_dir: Path, name: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(WRONG_ATTENTION)
    with pytest.raises(UserError) as caught:
        prepare_own_code(read(model_name_or_path=str(model_dir), attn_implementation=f"mine:{name}"), ALONE)
    assert str(caught.value) == f"attn_implementation: mine:{name}: {said}"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_an_attention_is_tried_with_what_a_layer_gives_it(read: Any, tmp_path: Path, family: str) -> None:
    (tmp_path / "mine.py").write_text(WRONG_ATTENTION)
    config = read(model_name_or_path="small", attn_implementation="mine:look", bf16=False)
    register_attention(config)
    model = make_model(family, attn_implementation="mine:look").eval()
    model.config.save_pretrained("small")
    try_attention(config, ALONE)
    model(input_ids=torch.arange(6)[None])
    tried, words, again, _, real, real_words = load("mine:SEEN", "")[:6]
    assert tried == again == real
    assert real_words.items() <= words.items()


class OwnAttention(torch.nn.Module):
    """Of a model's own code, whose configuration calls heads otherwise."""

    layer_idx, config = 0, SimpleNamespace(n_heads=4)


def test_a_model_whose_own_code_cannot_be_tried_is_left_to_its_loading(
    read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_more(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("This modeling file requires einops")

    config = read(attn_implementation="mine:look")
    for made in (needs_more, lambda *args, **kwargs: torch.nn.Sequential(OwnAttention())):
        monkeypatch.setattr(own_attention, "skeleton", made)
        try_attention(config, ALONE)


@pytest.mark.parametrize("name", ["my_attention:by_rows", "mine:by_mask"])
def test_a_right_attention_passes_the_trial(read: Any, tmp_path: Path, model_dir: Path, name: str) -> None:
    (tmp_path / "mine.py").write_text(WITHOUT)
    prepare_own_code(read(model_name_or_path=str(model_dir), attn_implementation=name), ALONE)


def test_a_model_that_hands_no_borders_on_is_refused(read: Any) -> None:
    name = "my_attention:by_rows"
    register_attention(read(attn_implementation=name))
    model = make_model("gemma2", attn_implementation=name, sliding_window=7, head_dim=8)
    with pytest.raises(
        UserError, match=r"^attn_implementation: my_attention:by_rows: Gemma2ForCausalLM caps its scores"
    ):
        keep_rows_apart(model, name)


# ---- Optimizer


def test_options_of_an_optimizer_are_what_they_read_as(read: Any) -> None:
    config = read(optim="my_optimizer:SignSGD", optim_args="momentum=0.95, weight_decay=1e-2")
    assert optimizer_options(config) == {"momentum": 0.95, "weight_decay": 0.01}
    assert optimizer_options(read(optim="my_optimizer:SignSGD", optim_args="a=1,b=true,c=x")) == {
        "a": 1,
        "b": True,
        "c": "x",
    }
    kind = own_optimizer(config)
    weight = torch.nn.Parameter(torch.ones(2))
    made = kind([weight], lr=0.5, **optimizer_options(config))  # type: ignore[arg-type]
    weight.grad = torch.tensor([1.0, -2.0])
    made.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.995 - 0.5, 0.995 + 0.5]))


def test_an_optimizer_of_the_users_wants_no_package_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_bitsandbytes("none", "lion.mine:Lion")
    with pytest.raises(UserError, match=r"^optim: adamw_8bit: bitsandbytes is not installed"):
        require_bitsandbytes("none", "adamw_8bit")


# ---- Resuming


def test_other_code_is_another_run(read: Any, tmp_path: Path) -> None:
    keys = {"optim": "my_optimizer:SignSGD", "callbacks": [{"my_callbacks:StopBelow": {"bound": 1}}],
            "attn_implementation": "my_attention:by_rows", "data_format": "my_rows:tickets"}  # fmt: skip
    then = identity(read(**keys), None, "rows")
    assert changes(then, identity(read(**keys), None, "rows")) == {}
    for name in ("my_optimizer", "my_callbacks", "my_attention", "my_rows"):
        (tmp_path / f"{name}.py").open("a").write("\n# another\n")
    found = changes(then, identity(read(**keys), None, "rows"))
    assert list(found) == [
        "code of my_callbacks:StopBelow", "code of my_attention:by_rows", "code of my_optimizer:SignSGD"]  # fmt: skip
    assert re.fullmatch(r"code of my_callbacks:StopBelow, which has changed; .*", changes_in_words(found))


def test_the_file_that_defines_a_name_counts_and_the_one_that_names_it(read: Any, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(
        "import functools\nfrom my_rows import tickets\npart = functools.partial(print)\n"
    )
    read()
    found = [source_hash("shown:tickets", "data_format"), source_hash("shown:part", "data_format")]
    for name in ("my_rows", "shown"):
        (tmp_path / f"{name}.py").open("a").write("\n# another\n")
        found += [source_hash("shown:tickets", "data_format"), source_hash("shown:part", "data_format")]
    assert [len(set(found[::2])), found[1] == found[3], found[3] == found[5]] == [3, True, False]


def test_a_name_is_imported_once(read: Any, tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text("from pathlib import Path\nPath('times').open('a').write('x')\nthing = 1\n")
    assert [load("counted:thing", "optim"), load("counted:thing", "callbacks")] == [1, 1]
    assert (tmp_path / "times").read_text() == "x"
