"""The arithmetic of an evaluation: scores, intervals, losses row by row, which prompts are answered together."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.config.keys import Config
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.errors import UserError
from ds_sft.evaluation import scores
from ds_sft.evaluation.bootstrap import RESAMPLES, Difference, Estimate, difference, estimate, metric, resampled
from ds_sft.evaluation.loss import loss_batches, row_losses
from ds_sft.evaluation.measure import (
    Item,
    Result,
    answer_batches,
    asked_alike,
    counts_padding,
    greedy,
    in_parts,
    numbers_of,
    opens_reasoning,
    sample_places,
)
from ds_sft.evaluation.progress import Progress
from ds_sft.evaluation.report import same_tokens
from ds_sft.evaluation.scores import score, words
from ds_sft.export.predict import Answer, answer_batch, generation_options
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.work import Work, open_work
from tests.test_predict import always_says, make

PAIRS = [  # answer, reference
    ("Paris.", "Paris."),
    ("The capital is Lyon.", "The capital of France is Paris."),
    ("今天很好", "今天天气很好"),
    ("Привет, как дела?", "Привет! Хорошо."),
    ("", "nothing was said"),
    ("something", ""),
]


# ---- Scores


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ("Paris.", " Paris.\n", 100),
        ("paris.", "Paris.", 0),
        ("<think>\nFrance, so\n</think>\n\nParis.", "Paris.", 100),
        ("Paris.", "<think>France</think>Paris.", 100),
        ("", "", 100),
        ("<think>\nParis.", "Paris.", 0),
    ],
)
def test_exact_match_is_of_stripped_texts_without_reasoning(answer: str, reference: str, exact: float) -> None:
    assert score(answer, reference).exact_match == exact


def test_an_answer_that_was_cut_within_its_reasoning_is_empty(tokenizer: Any) -> None:
    assert score("Paris.", "Paris.", opened=True).chrf == 0
    assert score("So.\n</think>\n\nParis.", "Paris.", opened=True).exact_match == 100
    for text, opened in (("x<think>\n", True), ("<think>\n\n</think>\n\n", False), ("x", False)):
        assert opens_reasoning(tokenizer(text, add_special_tokens=False).input_ids, tokenizer) is opened


def test_models_are_asked_the_same_questions() -> None:
    """Else a difference would be one of other rows."""
    ids = {"a": [[1], [], [3]], "b": [[4, 4], [5], []]}
    items = {name: [Item(("f", i), "q", "r", prompt, [i]) for i, prompt in enumerate(own)] for name, own in ids.items()}
    asked = {name: [item.prompt for item in own] for name, own in asked_alike(items).items()}
    assert asked == {"a": [[1], [], []], "b": [[4, 4], [], []]}


def test_chrf_by_hand() -> None:
    """ab for abc: precisions 1 and 1, recalls 2/3 and 1/2, no n-grams of 3: F2 of 1 and 7/12."""
    found = score("ab", "abc")
    assert found.statistics[:9] == [2, 3, 2, 1, 2, 1, 0, 1, 0]
    assert found.chrf == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))


def test_chrf_is_that_of_sacrebleu() -> None:
    found = [Result(answer=vars(score(answer, reference))) for answer, reference in PAIRS]
    for (answer, reference), result in zip(PAIRS, found, strict=True):
        assert result.answer is not None
        assert result.answer["chrf"] == CHRF().sentence_score(answer, [reference]).score
    of_corpus = CHRF().corpus_score([answer for answer, _ in PAIRS], [[reference for _, reference in PAIRS]]).score
    assert metric("chrf", numbers_of(found).sum(0)[None])[0] == of_corpus


def test_rouge_l_by_hand() -> None:
    """今天很好 for 今天天气很好: all 4 characters are in the 6 of the reference, in order."""
    assert score("今天很好", "今天天气很好").rouge_l == pytest.approx(100 * 2 * 1 * (4 / 6) / (1 + 4 / 6))
    assert score("Привет, как дела?", "привет! как жизнь?").rouge_l == pytest.approx(100 * 2 / 3)


def test_rouge_l_of_english_is_that_of_rouge_score() -> None:
    scorer = RougeScorer(["rougeL"])
    for answer, reference in [PAIRS[0], PAIRS[1], ("Don't, 3.5 km_h", "don't 3 km"), PAIRS[4], PAIRS[5]]:
        assert score(answer, reference).rouge_l == 100 * scorer.score(reference, answer)["rougeL"].fmeasure
    assert scorer.score("今天天气很好", "今天天气很好")["rougeL"].fmeasure == 0  # why it has another tokenizer here


def test_words_of_many_scripts() -> None:
    """A word's accents and vowel signs stay with it; Chinese, Japanese and Thai have a word for each character."""
    assert words("Don't café 2024年 今天 नमस्ते Привет") == [
        *("don", "t", "café", "2024", "年", "今", "天", "नमस्ते", "привет"),
    ]
    assert words("カタカナ สวัสดี 안녕하세요") == ["カ", "タ", "カ", "ナ", "ส", "วั", "ส", "ดี", "안녕하세요"]
    assert words(" … 😀") == []


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(UserError) as error:
        scores.require_metrics("evaluate_rows: 0")
    assert str(error.value) == (
        "no-such-package is not installed, which scores answers: pip install no-such-package, or evaluate_rows: 0"
    )


# ---- Intervals


def numbers_and_texts(seed: int, count: int) -> tuple[Any, list[tuple[str, str]]]:
    rng = np.random.default_rng(seed)
    texts = [PAIRS[i] for i in rng.integers(len(PAIRS), size=count)]
    results = [
        Result(float(loss), int(tokens), vars(score(*pair)))
        for loss, tokens, pair in zip(rng.random(count) * 9, rng.integers(1, 9, count), texts, strict=True)
    ]
    return numbers_of(results), texts


def test_intervals_are_those_of_a_plain_loop() -> None:
    numbers, texts = numbers_and_texts(1, 17)
    rng, drawn = np.random.default_rng(5), []
    for _ in range(RESAMPLES):
        rows = rng.integers(17, size=17)
        loss = sum(numbers[row, 0] for row in rows) / sum(numbers[row, 1] for row in rows)
        exact = np.mean([numbers[row, 3] for row in rows])
        rouge = np.mean([numbers[row, 4] for row in rows])
        answers, references = [texts[row][0] for row in rows], [texts[row][1] for row in rows]
        drawn.append((loss, np.exp(loss), exact, CHRF().corpus_score(answers, [references]).score, rouge))
    sums = resampled(numbers, 5)
    for column, name in enumerate(("loss", "perplexity", "exact_match", "chrf", "rouge_l")):
        values = [draw[column] for draw in drawn]
        found = estimate(name, numbers, sums)
        assert [found.low, found.high] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())
        assert found.low <= found.value <= found.high


def test_two_models_get_the_same_draws() -> None:
    """A model that is a little better on every row is better in every draw, however much the rows differ."""
    numbers, _ = numbers_and_texts(1, 17)
    better = numbers.copy()
    better[:, 0] -= 0.01 * numbers[:, 1]
    first, second = ((found, resampled(found, 7)) for found in (numbers, better))
    found = difference("loss", first, second)
    assert (found.better, found.worse) == (1, 0)
    assert [found.value, found.low, found.high] == pytest.approx([-0.01] * 3)
    assert difference("loss", second, first).worse == 1
    assert difference("chrf", first, second) == Difference(0, 0, 0, better=0, worse=0)
    wide = estimate("loss", *first)
    assert wide.high - wide.low > 0.5  # apart they could not be told from each other


def test_what_was_not_measured_is_no_number() -> None:
    numbers = numbers_of([Result(2.0, 4), Result(4.0, 2)])
    draws = resampled(numbers, 1)
    assert estimate("loss", numbers, draws).value == 1
    assert np.isnan([estimate("chrf", numbers, draws).value, estimate("exact_match", numbers, draws).low]).all()
    assert estimate("loss", numbers[:1], resampled(numbers[:1], 1)) == Estimate(0.5, 0.5, 0.5)


def test_losses_are_compared_of_the_same_tokens_alone() -> None:
    def comparable(first: tuple[list[int], dict[str, int]], second: tuple[list[int], dict[str, int]]) -> bool:
        vocabs = {"a": first[1], "b": second[1]}
        subjects: Any = [
            SimpleNamespace(name=name, tokenizer=SimpleNamespace(get_vocab=lambda vocab=vocab: vocab))
            for name, vocab in vocabs.items()
        ]
        counts = {"a": first[0], "b": second[0]}
        return same_tokens(subjects, {name: [Result(1.0, tokens) for tokens in counts[name]] for name in counts})

    assert comparable(([3, 4], {"x": 1}), ([3, 4], {"x": 1}))
    assert not comparable(([3, 4], {"x": 1}), ([4, 3], {"x": 1}))
    assert not comparable(([3, 4], {"x": 1}), ([3, 4], {"y": 1}))


# ---- Losses


KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0},  # bends its logits
    "gpt2": {"n_positions": 64},
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_rows_are_those_of_each_row_alone(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, **sizes, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows = []
    for length, learned in ((5, 2), (9, 4), (3, 0), (7, 7)):
        ids = torch.randint(1, 50, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length - learned) + ids[length - learned :]})
    found = row_losses(model, rows, 0)
    assert [count for _, count in found] == [2, 4, 0, 6]  # the first token of a row is no target
    for row, (loss, count) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        alone = -sum(
            logits[i - 1, token].item() for i, token in enumerate(row["labels"]) if i and token != IGNORE_INDEX
        )
        assert loss == pytest.approx(alone, rel=1e-5), count
    with torch.no_grad():  # the model is as it was
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)


def test_rows_of_a_batch_are_about_as_long_and_their_logits_bounded() -> None:
    assert loss_batches([3, 9, 5, 8], [1, 1, 1, 1], 100) == [[1, 3, 2, 0]]
    assert loss_batches([5000, 4000, 9000, 4000, 100], [1] * 5, 100) == [[2], [0], [1, 3], [4]]  # 8192 places
    assert loss_batches([10, 10, 10], [1000, 1000, 1000], 2**17) == [[0, 1], [2]]  # 2048 supervised: a GiB


# ---- Answers


def test_prompts_that_are_answered_together() -> None:
    lengths = [3, 9, 0, 5, 9, 4, 7, 8, 8, 6]
    assert answer_batches(lengths, 10, None, alike=False) == [[1, 4], [7, 8], [6, 9], [3, 5], [0]]
    assert answer_batches([5, 9, 5, 9, 5] * 8, 10, None, alike=True) == [
        *([1, 3, 6, 8, 11], [13, 16, 18, 21, 23], [26, 28, 31, 33, 36], [38]),
        *([0, 2, 4, 5, 7], [9, 10, 12, 14, 15], [17, 19, 20, 22, 24], [25, 27, 29, 30, 32], [34, 35, 37, 39]),
    ]
    # A table of 12 positions: prompts of 9 and 8 have room for 3 and 4 tokens, those of 2 for all 10.
    assert answer_batches([2, 9, 8, 2, 99] * 4, 10, 12, alike=False)[:8] == [
        *([4, 9, 14], [19], [1, 6, 11], [16], [2, 7, 12], [17], [0, 3, 5], [8, 10, 13]),
    ]
    assert len(answer_batches([1000] * 400, 1000, None, alike=False)) == 25  # of 16 rows: 32,768 tokens


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_greedy_answers_do_not_depend_on_their_batch(model_dir: Path, tokenizer: Any, penalty: float) -> None:
    """In float32, also where the model's own files ask for a penalty."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.repetition_penalty = penalty
    config = make(model_dir, predict_max_new_tokens=8)
    prompts = [tokenizer(text).input_ids for text in ("What is", "今天天气怎么样", "x", "Привет! Как дела?", "y" * 30)]
    alone = [answer_batch(model, [prompt], tokenizer, config)[0] for prompt in prompts]
    assert answer_batch(model, prompts, tokenizer, config) == alone


def test_padding_is_a_part_of_the_prompt_to_one_processor(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """`no_repeat_ngram_size: 1` forbids the pad token, which ends this model's answers, to prompts that are padded."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "m"))
    always_says(folder, [30, 0, 31])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = 0
    short, long = (tokenizer(f"{text}assistant\n", add_special_tokens=False).input_ids for text in ("", "one two "))
    config = make(folder, predict_max_new_tokens=3, generation={"no_repeat_ngram_size": 1})
    (alone,) = answer_batch(model, [short], tokenizer, config)
    assert alone == Answer(tokenizer.decode([30]).strip(), 2, cut=False)
    padded, _ = answer_batch(model, [short, long], tokenizer, config)
    assert padded != alone
    assert counts_padding(model, config)
    assert answer_batches([len(short), len(long)], 3, None, alike=True) == [[1], [0]]
    given = [{"no_repeat_ngram_size": 0}, {"repetition_penalty": 1.1}, {"num_beams": 2}, None]
    assert [counts_padding(model, make(folder, generation=one)) for one in given] == [False] * 4
    model.generation_config.no_repeat_ngram_size = 3
    assert counts_padding(model, make(folder))


def test_an_answer_is_cut_where_nothing_ended_it(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "m"))
    always_says(folder, [30, 31, 2, 32])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("assistant\n", add_special_tokens=False).input_ids
    text = tokenizer.decode([30, 31]).strip()
    ended = answer_batch(model, [prompt, prompt], tokenizer, make(folder, predict_max_new_tokens=9))
    assert ended == [Answer(text, 3, cut=False)] * 2
    assert answer_batch(model, [prompt], tokenizer, make(folder, predict_max_new_tokens=3)) == ended[:1]
    assert answer_batch(model, [prompt], tokenizer, make(folder, predict_max_new_tokens=2)) == [
        Answer(text, 2, cut=True)
    ]


def test_sampling_is_left_out() -> None:
    def options(**given: Any) -> dict[str, Any]:
        return generation_options(greedy(Config(model_name_or_path="m", train_file="t", generation=given)))

    assert options(do_sample=True, temperature=0.7, top_p=0.9) == options()
    assert options(do_sample=True, num_beams=2)["num_beams"] == 2


def test_rows_that_are_drawn() -> None:
    places = [("a", 1), ("a", 2), ("b", 1), ("b", 7)]
    assert sample_places(places, None, 1) == sample_places(places, 9, 1) == places
    some = sample_places(places, 2, 1)
    assert some == sample_places(places, 2, 1)
    assert len(some) == 2
    assert some == sorted(some)
    assert {tuple(sample_places(places, 2, seed)) for seed in range(20)} > {tuple(some)}


# ---- Memory, ranks, progress


def test_a_batch_without_memory_is_halved() -> None:
    asked: list[list[int]] = []

    def do(items: Any) -> list[int]:
        asked.append(list(items))
        if len(items) > 1 and sum(items) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [10 * item for item in items]

    assert in_parts(do, [1, 2, 3, 4], str) == [10, 20, 30, 40]
    assert asked == [[1, 2, 3, 4], [1, 2], [3, 4], [3], [4]]


def test_a_row_without_memory_is_named() -> None:
    def do(items: Any) -> list[int]:
        raise MemoryError

    with pytest.raises(UserError, match=r"^row 7 is too long$"):
        in_parts(do, [7, 8], lambda item: f"row {item} is too long")

    def broken(items: Any) -> list[int]:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_parts(broken, [7, 8], str)


def test_ranks_share_the_pieces_and_rank_0_hears_all() -> None:
    store, heard, done = dist.HashStore(), [], {0: [], 1: []}
    both = threading.Barrier(2)

    def rank(number: int) -> None:
        launch = Launch(launcher="torchrun", rank=number, local_rank=number, world_size=2, local_world_size=2)
        work = Work(launch, store)
        both.wait()

        def do(piece: int) -> list[float]:
            done[number].append(piece)
            if piece < 2:
                both.wait()  # each has one of the first two
            return [piece + 0.1, number]

        work.share("first", 6, do, lambda piece, found: heard.append((number, piece, found[0])))
        work.end()

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(heard) == [(0, piece, piece + 0.1) for piece in range(6)]
    assert sorted(done[0] + done[1]) == list(range(6))
    assert done[0]
    assert done[1]


def test_ranks_that_torchrun_starts_again_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its store, which outlives them: else nobody would take what the first ones have taken."""
    kept = dist.HashStore()
    monkeypatch.setattr(
        "ds_sft.ranks.work.connect",
        lambda launch, purpose: SimpleNamespace(store=dist.PrefixStore(purpose, kept)),
    )
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        launch = Launch(launcher="torchrun", rank=0, local_rank=0, world_size=2, local_world_size=2)
        assert open_work(launch, "evaluate").store.add("loss-taken", 1) == 1


def test_progress_off_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("ds_sft.evaluation.progress.time.monotonic", lambda: now[0])
    shown = Progress("Answers (after)", 10)
    for rows, seconds in ((2, 20), (2, 20), (2, 5), (4, 40)):
        now[0] += seconds
        shown.advance(rows)
    assert capsys.readouterr().out.splitlines() == [
        "Answers (after): 4 of 10 rows; 0:01:00 left",
        "Answers (after): 10 of 10 rows",
    ]
