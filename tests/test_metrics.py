"""Every metric by hand and against the library that defines it, and modules of evaluate."""

import logging
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from scipy import stats
from sklearn import metrics as sklearn_metrics

from fedpeft import evaluate_metrics, metrics
from fedpeft.config.load import load_config
from fedpeft.config.schema import ConfigError
from fedpeft.data.tasks.text import TextClassification
from fedpeft.evaluate_metrics import title
from fedpeft.metrics import measure
from tests.conftest import Runner

LABELS = ("accuracy", "f1", "f1_macro", "f1_weighted", "matthews")
NUMBERS = ("spearman", "pearson")
TEXTS = ("bleu4", "rouge_l", "exact_match", "token_f1")
NAMES = (*LABELS, *NUMBERS, *TEXTS)
WORDS = "the a cat dogs Café sat, on. «blue» naïve 東京 running 3.14 don't mat! &amp; été".split()


def rows(name: str, count: int = 6) -> tuple[list[Any], list[Any]]:
    """Draw predictions and references that a metric takes, different from each other."""
    draw = random.Random(count)
    if name in LABELS:
        return draw.choices((0, 1), k=count), draw.choices((0, 1), k=count)
    if name in NUMBERS:
        return [draw.random() for _ in range(count)], [draw.random() for _ in range(count)]
    references = [[sentence(draw) for _ in range(1 + i % 3)] for i in range(count)]
    predictions = [draw.choice(row).split()[i % 4 :] for i, row in enumerate(references)]
    return [" ".join(words) for words in predictions], references


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))


@pytest.mark.parametrize(
    ("name", "value"),
    [  # class 1: 2 right, 2 wrongly predicted; class 0: 1 right, 2 missed
        ("accuracy", 3 / 5),
        ("f1", 4 / 6),
        ("f1_macro", (4 / 6 + 2 / 4) / 2),
        ("f1_weighted", (2 * 4 / 6 + 3 * 2 / 4) / 5),
        ("matthews", 2 / math.sqrt(4 * 2 * 3 * 1)),
    ],
)
def test_labels_by_hand(name: str, value: float) -> None:
    predictions, references = [1, 1, 1, 1, 0], [1, 0, 1, 0, 0]
    assert measure(name, predictions, references) == pytest.approx(value)
    assert measure(name, np.array(predictions), np.array(references)) == pytest.approx(value)


def test_labels_as_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 200), rng.integers(0, 4, 200)  # 4 is never predicted
    for average in ("macro", "weighted"):
        theirs = sklearn_metrics.f1_score(truth, guess, average=average, zero_division=0)  # type: ignore
        assert measure(f"f1_{average}", guess, truth) == pytest.approx(theirs)
    theirs = sklearn_metrics.matthews_corrcoef(truth, guess)
    assert measure("matthews", guess, truth) == pytest.approx(theirs)
    assert measure("accuracy", guess, truth) == sklearn_metrics.accuracy_score(truth, guess)


def test_f1_without_positives_is_0_and_of_other_classes_refused() -> None:
    assert measure("f1", [0, 0], [0, 0]) == 0
    assert measure("f1", [0, 0], [0, 1]) == 0
    with pytest.raises(ValueError, match="multiclass"):
        measure("f1", [0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize(
    ("predictions", "references", "value"),
    [
        ([2, 2], [2, 2], 1 / 4),  # a client with rows of one class, all right
        ([0, 1, 1], [0, 1, 0], (2 / 3 + 2 / 3) / 4),
        ([3, 3, 3], [0, 1, 2], 0),
    ],
)
def test_macro_f1_is_over_the_classes_of_the_task(
    predictions: list[int], references: list[int], value: float
) -> None:
    assert measure("f1_macro", predictions, references, 4) == pytest.approx(value)
    theirs = sklearn_metrics.f1_score(
        references,
        predictions,
        labels=range(4),
        average="macro",
        zero_division=0,  # type: ignore
    )
    assert measure("f1_macro", predictions, references, 4) == pytest.approx(theirs)


def test_a_task_s_macro_f1_and_its_baseline_count_its_classes() -> None:
    task = TextClassification(path="-", labels=["a", "b", "c", "d"], metrics=["f1_macro"])
    assert task.scored([1, 1], [1, 1]) == {"f1_macro": 1 / 4}
    assert task.baseline(np.array([1, 1, 0]), np.array([1, 1])) == 1 / 4


def test_as_many_classes_as_rows() -> None:
    classes = list(range(30))
    assert measure("f1_macro", classes, [*classes[:-1], 0]) == pytest.approx((28 + 2 / 3) / 30)


@pytest.mark.parametrize(("name", "value"), [("spearman", 0.8), ("pearson", 13 / math.sqrt(250))])
def test_numbers_by_hand(name: str, value: float) -> None:
    # ranks differ by 0, 1, 1, 0: 1 - 6 * 2 / (4 * 15); deviations -3 -2 -1 6 and -1.5 .5 -.5 1.5
    assert measure(name, [1, 2, 3, 10], [1, 3, 2, 4]) == pytest.approx(value)
    assert measure(name, [-1, -2, -3, -10], [1, 3, 2, 4]) == pytest.approx(-value)


def test_numbers_as_scipy_with_ties_and_single_precision() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 100)
    guess = (truth + rng.normal(size=100)).astype(np.float32)
    guess[10:20] = guess[0]
    ours = measure("pearson", guess, truth)
    assert ours == pytest.approx(stats.pearsonr(guess.astype(float), truth)[0], abs=1e-14)
    assert measure("spearman", guess, truth) == pytest.approx(stats.spearmanr(guess, truth)[0])  # type: ignore


@pytest.mark.parametrize("name", [*NUMBERS, "matthews"])
def test_constant_is_0(name: str) -> None:
    assert measure(name, [1, 1, 1], [0, 1, 2]) == 0
    assert measure(name, [0, 1, 2], [1, 1, 1]) == 0
    assert measure(name, [0, 0, 0], [0, 0, 0]) == 0
    assert measure(name, [1], [1]) == 0


@pytest.mark.parametrize("name", NUMBERS)
def test_rounding_is_constant_and_small_spread_is_not(name: str) -> None:
    assert measure(name, [0.1 + 0.2, 0.3, 0.3], [3, 1, 2]) == 0
    assert measure(name, [7, 7 + 1e-6, 7 + 2e-6], [1, 2, 3]) == pytest.approx(1)
    assert measure(name, [1e-20, 2e-20, 3e-20], [1, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"values of {name} must be finite, got nan or inf"):
        measure(name, [1, value], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        measure(name, [1, 2], [1, value])


def test_bleu_by_hand() -> None:
    # 5 of 6 words (the second "the" is one too many), 3 of 5 pairs, 2 of 4 triples, 1 of 3
    value = measure("bleu4", ["the cat sat on the mat"], ["the cat sat on a mat"])
    assert value == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # no run of 4: counts as half of one
    value = measure("bleu4", ["a b c x"], ["a b c y"])
    assert value == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** 0.25)
    # all right but 8 words where the nearest references have 4 + 10
    references = [["x y z w", "a b c d"], ["e f g h i j k l m n"]]
    value = measure("bleu4", ["a b c d", "e f g h"], references)
    assert value == pytest.approx(math.exp(1 - 14 / 8))


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Hello, world!", "Hello , world !", True),  # punctuation is a word
        ("pay &lt; 5 dollars", "pay < 5 dollars", True),
        ("“a b c d”", "“ a b c d ”", False),  # but not beyond ASCII, as tokenizer intl would
        ("a b c d", "A B C D", False),
    ],
)
def test_bleu_tokenizer_is_13a(prediction: str, reference: str, same: bool) -> None:
    assert (measure("bleu4", [prediction], [reference]) == 1) is same


def test_bleu_as_sacrebleu_where_rows_differ_in_references() -> None:
    predictions, references = rows("bleu4", 30)
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(3)]
    theirs = BLEU(tokenize="13a").corpus_score(predictions, columns).score  # type: ignore[arg-type]
    assert 10 < theirs < 90
    assert measure("bleu4", predictions, references) == theirs / 100


def test_bleu_is_at_most_1_and_0_without_4_grams() -> None:
    assert BLEU().corpus_score(["a b c d e"], [["a b c d e"]]).score > 100  # by rounding
    assert measure("bleu4", ["a b c d e"], ["a b c d e"]) == 1
    assert measure("bleu4", ["a b c"], ["a b c"]) == 0


def test_bleu_logs_nothing_of_spaced_full_stops(caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"line {i} ends like this ." for i in range(120)]
    with caplog.at_level(logging.DEBUG):
        measure("bleu4", texts, texts)
        measure("rouge_l", texts[:2], texts[:2])
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("the cat sat on the mat", ["the cat lay on a mat"], 4 / 6),
        ("the cat sat", ["the cat sat on the mat"], 2 * 3 / (3 + 6)),
        ("b a", ["a b"], 1 / 2),
        ("a b\nc d", ["c d\na b"], 2 / 4),  # a line is not a unit of its own
        ("The, CAT!", ["the cat"], 1),
        ("cats running", ["cat run"], 0),  # no stemmer
        ("naïve 東京", ["na ve"], 1),  # only a-z count where most letters are Latin
        ("a b c d", ["x", "a b", "a y"], 2 * 2 / (4 + 2)),
    ],
)
def test_rouge_by_hand(prediction: str, references: list[str], value: float) -> None:
    assert measure("rouge_l", [prediction], [references]) == pytest.approx(value)
    both = measure("rouge_l", [prediction, "same"], [references, ["same"]])
    assert both == pytest.approx((value + 1) / 2)


CHINESE, PART = "休息和喝水 3天。", "休息和睡觉 3天。"  # 5 + 3 characters, of which 2 differ
OTHER_SCRIPTS = {
    # metric, prediction and reference: value
    ("rouge_l", CHINESE, CHINESE): 1,
    ("rouge_l", PART, CHINESE): 5 / 7,  # without the full stop
    ("rouge_l", "Привет, мир!", "привет мир"): 1,
    ("rouge_l", "привет мир", "привет, тёмный мир"): 2 * 2 / (2 + 3),
    ("rouge_l", "हिन्दी में", "हिन्दी में"): 1,
    ("rouge_l", "हिन्दी", "हिन्दू"): 0,  # a vowel sign is part of the word
    ("rouge_l", "สวัสดี", "สวัสดี"): 1,
    ("rouge_l", "休息", "rest"): 0,
    ("bleu4", CHINESE, CHINESE): 1,
    ("token_f1", CHINESE, CHINESE): 1,
    ("token_f1", PART, CHINESE): 6 / 8,
    ("token_f1", "что-то тут", "что-то там"): 1 / 2,
}


@pytest.mark.parametrize("case", OTHER_SCRIPTS)
def test_words_of_other_scripts(case: tuple[str, str, str]) -> None:
    name, prediction, reference = case
    value = measure(name, [prediction], [reference])
    assert value == pytest.approx(OTHER_SCRIPTS[case])


def test_bleu_of_chinese_as_sacrebleu_s_tokenizer_zh() -> None:
    """Rows of Latin words in the same corpus are split by 13a, as alone."""
    predictions, references = [PART, "wait, the cat sat."], [CHINESE, "the cat, it sat."]
    theirs = BLEU(tokenize="zh").corpus_score(predictions, [references]).score
    assert 20 < theirs < 90
    assert measure("bleu4", predictions, references) == pytest.approx(theirs / 100)


def test_few_letters_of_another_script_change_nothing() -> None:
    """A row counts by the script of most letters of its references."""
    text, reference = "the αβγ waves", "an αβγ wave of the brain"
    theirs = BLEU(tokenize="13a").corpus_score([text], [[reference]]).score
    assert measure("bleu4", [text], [reference]) == theirs / 100
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    assert (
        measure("rouge_l", [text], [reference]) == scorer.score(reference, text)["rougeL"].fmeasure
    )


def test_rouge_as_rouge_score() -> None:
    predictions, references = rows("rouge_l", 30)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(predictions, references, strict=True)
    best = [max(scorer.score(r, p)["rougeL"].fmeasure for r in row) for p, row in pairs]
    assert len(set(best)) > 10
    assert measure("rouge_l", predictions, references) == pytest.approx(np.mean(best))


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),
        ("in  1889\n", "in 1889", 1),
        ("U.S.", "us", 1),
        ("a dog and an owl", "dog and the owl", 1),
        ("don't", "dont", 1),
        ("$5", "5", 1),
        ("theatre", "atre", 0),  # an article is a word
        ("the-end", "end", 0),  # punctuation goes before articles, and leaves no space
        ("rock–the–boat", "rock– –boat", 1),  # an article leaves a space
        ("“tower”", "tower", 0),  # only ASCII punctuation
        ("ÉCOLE", "école", 1),
        ("école", "ecole", 0),
        ("tower", "eiffel tower", 0),
    ],
)
def test_exact_match_by_hand(prediction: str, reference: str, value: float) -> None:
    assert measure("exact_match", [prediction], [reference]) == value
    assert measure("exact_match", [prediction], [["other", reference]]) == value
    assert measure("exact_match", [prediction, "x", "x"], [reference, "x", "y"]) == (1 + value) / 3


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1),
        ("the cat sat sat", ["a cat sat"], 2 * 2 / (3 + 2)),  # 2 of 3 and 2 of 2
        ("cat cat", ["cat, cat, cat"], 2 * 2 / (2 + 3)),
        ("tower eiffel", ["eiffel tower"], 1),
        ("in Paris", ["London", "paris", "in the city of Paris"], 2 / 3),
        ("the", ["a"], 0),
        ("Rome", ["Paris"], 0),
    ],
)
def test_token_f1_by_hand(prediction: str, references: list[str], value: float) -> None:
    assert measure("token_f1", [prediction], [references]) == pytest.approx(value)
    both = measure("token_f1", [prediction, "x"], [references, ["y"]])
    assert both == pytest.approx(value / 2)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_prediction_is_0(name: str, empty: str) -> None:
    assert measure(name, [empty], ["the cat sat on it"]) == 0
    for reference in ("The", ".", ""):  # nothing is left of them, as SQuAD's script sees it
        assert measure(name, [empty], [reference]) == (name == "exact_match")
    right = "one two three four"
    assert 0 < measure(name, [empty, right], [right, right]) < 0.51
    assert measure(name, [right], [""]) == 0


@pytest.mark.parametrize("name", TEXTS)
def test_one_reference_needs_no_list(name: str) -> None:
    predictions, references = rows(name)
    first = [row[0] for row in references]
    value = measure(name, predictions, [[each] for each in first])
    assert measure(name, predictions, first) == value
    assert measure(name, np.array(predictions), tuple(first)) == value
    mixed = [row if i % 2 else row[0] for i, row in enumerate(references)]
    assert measure(name, predictions, mixed) >= value > 0


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} needs .* 1 or more, got 0 predictions"):
        measure(name, [], [])
    with pytest.raises(ValueError, match="got 2 predictions and 3 references"):
        measure(name, ["1", "0"], ["1", "0", "1"])
    with pytest.raises(ValueError, match="got 3 predictions and 2 references"):
        measure(name, [1, 0, 1], [1, 0])


def test_unknown_metric() -> None:
    assert tuple(metrics.MEASURES) == NAMES
    listed = ", ".join(NAMES)
    with pytest.raises(
        ValueError, match=f"^unknown metric bleu, must be one of {listed}, or a module "
    ):
        measure("bleu", ["a"], ["a"])


@pytest.mark.parametrize("name", TEXTS)
def test_text_refusals(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs at least 1 reference a row, .* in row 2 "):
        measure(name, ["a", "b"], [["a"], []])
    for predictions, references in ((["a", 3], ["a", "b"]), (["a", "b"], [["a"], ["b", 3]])):
        with pytest.raises(ValueError, match=f"texts of {name} must be str, got int"):
            measure(name, predictions, references)


def test_import_is_light() -> None:
    heavy = "{'evaluate', 'datasets', 'sklearn', 'scipy', 'rouge_score', 'nltk', 'sacrebleu'}"
    code = f"import sys, fedpeft.metrics; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- modules of evaluate ------------------------------------------------------------------------

MODULE = """
import datasets
import evaluate

class Metric(evaluate.Metric):
    def _info(self):
        kinds = {kinds}
        features = [datasets.Features({{"predictions": p, "references": r}}) for p, r in kinds]
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        {body}
"""
INT, TEXT = "datasets.Value('int64')", "datasets.Value('string')"
LISTS = f"datasets.List({TEXT})"
Write = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def caches_of_evaluate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(f"evaluate.config.{name}", tmp_path_factory.mktemp("evaluate"))
        yield


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, body, *kinds)`` writes a module's script and gives its folder."""

    def script(name: str, body: str, *kinds: tuple[str, str]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        pairs = ", ".join(f"({predictions}, {references})" for predictions, references in kinds)
        text = MODULE.format(kinds=f"[{pairs}]", body=body)
        (folder / f"{name}.py").write_text(text)
        return str(folder)

    return script


SHARE = "return {'share': sum(map(int.__eq__, predictions, references)) / len(references)}"


def test_a_module_s_only_value_has_the_folder_s_name(write: Write) -> None:
    folder = write("my_share", SHARE, (INT, INT))
    for name in (folder, f"evaluate:{folder}", f"{folder}/my_share.py"):
        assert title(name) == "my_share"
        assert measure(name, [1, 0, 1, 1], [1, 1, 1, 0]) == 0.5
    with pytest.raises(ValueError, match=f"^{folder} needs as many references"):
        measure(folder, [1], [])


def test_one_of_several_values_is_the_module_s_own_or_the_named_one(write: Write) -> None:
    folder = write("several", "return {'several': 3, 'other': 0.25, 'rows': [1]}", (INT, INT))
    assert measure(folder, [1], [1]) == 3
    assert measure(f"{folder}:other", [1], [1]) == 0.25
    assert title(f"{folder}:other") == "several_other"
    advice = f"write {folder}:KEY, where KEY is one of several, other"
    with pytest.raises(ValueError, match=f"^{folder}:rows has no number rows: {advice}$"):
        measure(f"{folder}:rows", [1], [1])
    folder = write("pair", "return {'a': 1, 'b': 2}", (INT, INT))
    listed = f"{folder} has no number pair: write {folder}:KEY, where KEY is one of a, b"
    with pytest.raises(ValueError, match=f"^{listed}$"):
        measure(folder, [1], [1])


WORDS_BODY = "return {'words': sum(len(r) for r in references)}"


@pytest.mark.parametrize(
    ("kinds", "value"),
    [  # letters of the first references, or numbers of references
        ([(TEXT, TEXT)], 1 + 3),
        ([(TEXT, LISTS)], 2 + 1),
        ([(TEXT, LISTS), (TEXT, TEXT)], 2 + 1),
    ],
)
def test_references_come_as_the_module_takes_them(
    write: Write, kinds: list[tuple[str, str]], value: int
) -> None:
    folder = write(f"words{len(kinds)}{value}", WORDS_BODY, *kinds)
    assert measure(folder, ["x", "y"], [["a", "bb"], ["ccc"]]) == value


def test_one_reference_becomes_a_list_where_a_module_takes_lists(write: Write) -> None:
    folder = write("listed", WORDS_BODY, (TEXT, LISTS))
    assert measure(folder, ["x", "y"], ["aaaa", "bbbb"]) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('lost')", " cannot score these rows: 'lost'"),
        ("return {'x': float('nan')}", " must give a finite number, got nan"),
        ("return None", " has no number .*, but it has no number"),
    ],
)
def test_a_module_s_error_is_one_sentence(write: Write, body: str, said: str) -> None:
    folder = write(f"wrong{len(body)}", body, (INT, INT))
    with pytest.raises(ValueError, match=f"^{folder}{said}"):
        measure(folder, [1], [1])


def test_rows_that_a_module_does_not_take_are_named_so(write: Write) -> None:
    folder = write("numbers", SHARE, (INT, INT))
    with pytest.raises(ValueError, match=f"^{folder} cannot score these rows: "):
        measure(folder, ["a"], [["b"]])


def test_a_module_is_seeded_and_leaves_numpy_s_generator(write: Write) -> None:
    folder = write("drawn", "import numpy; return {'x': numpy.random.random()}", (INT, INT))
    np.random.seed(5)
    first = measure(folder, [1], [1])
    after = np.random.random()
    assert measure(folder, [1], [1]) == first
    evaluate_metrics.loaded.cache_clear()  # as in another process
    assert measure(folder, [1], [1]) == first
    np.random.seed(5)
    assert np.random.random() == after


def test_many_threads_share_a_module(write: Write) -> None:
    folder = write("shared", SHARE, (INT, INT))

    def right(count: int) -> float:
        return measure(folder, [1] * 50, [1] * count + [0] * (50 - count))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(right, range(50))) == [i / 50 for i in range(50)]


def test_the_hub_s_names_without_a_network() -> None:
    with pytest.raises(ValueError) as caught:
        measure("evaluate:rouge", ["a"], ["a"])
    assert re.fullmatch(
        r"metric rouge is no folder here and cannot be had from the hub \(.+\): where there is a "
        r"network, run `hf download evaluate-metric/rouge --repo-type space --local-dir "
        r"FOLDER/rouge`, then give data.metrics=\[FOLDER/rouge\]",
        str(caught.value),
    )


BAD_NAMES = [
    (["nope"], "must be of accuracy, .*, or a module of evaluate, such as .*, got nope$"),
    (["rouge_l"], "must be of accuracy, .*, got rouge_l$"),
    (["./nowhere"], "data.metrics=./nowhere has no script .*/nowhere/nowhere.py: a module of "),
    (["evaluate:"], "data.metrics=evaluate: names no module: write evaluate:NAME or a folder$"),
    (["evaluate:some/one"], "=evaluate:some/one is no folder here, and scripts of the hub's users"),
    (["accuracy", "evaluate:accuracy"], "data.metrics gives two values the name accuracy$"),
    (["accuracy", "accuracy"], "data.metrics gives two values the name accuracy$"),
    (["evaluate:loss"], "data.metrics gives two values the name loss$"),
]


@pytest.mark.parametrize(("names", "said"), BAD_NAMES)
def test_names_are_checked_when_a_configuration_is_loaded(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config([f"data.metrics=[{','.join(names)}]"])


def test_language_modelling_takes_no_module(write: Write) -> None:
    folder = write("no_tokens", SHARE, (INT, INT))
    with pytest.raises(ConfigError, match=f"must be of token_accuracy, got {folder}$"):
        load_config(["data=docstrings_lm", f"data.metrics=[{folder}]"])


def test_a_run_scores_and_chooses_by_a_module(run: Runner, write: Write) -> None:
    folder = write("my_share", SHARE, (INT, INT))
    summary = run(f"data.metrics=[evaluate:{folder},accuracy]")
    assert summary["refused"] == {}
    for line in run.lines():
        shares = {k: v for k, v in line.items() if k.endswith("my_share")}
        assert shares
        for key, value in shares.items():
            assert value == line[key.replace("my_share", "accuracy")]
    assert any(k.endswith("my_share") for k in summary["final"])


def test_a_module_that_cannot_be_imported_ends_a_run_before_it_trains(
    run: Runner, write: Write
) -> None:
    folder = write("broken", "pass", (INT, INT))
    (Path(folder) / "broken.py").write_text("raise RuntimeError('no such licence')")
    with pytest.raises(ValueError, match=f"^metric {folder} cannot be loaded: no such licence"):
        run("method=fedsa_lora", f"data.metrics=[{folder}]")
    assert run.recorder.of("train") == []
