"""Metrics of labels, numbers and texts, computed without network, and modules of ``evaluate``.

Sources: BLEU by sacrebleu (https://aclanthology.org/W18-6319), ROUGE-L by rouge_score
(https://aclanthology.org/W04-1013), exact match and token F1 as in SQuAD v1.1's official script
(https://arxiv.org/abs/1606.05250), the others by scikit-learn and scipy. ROUGE-L
counts words of a to z and digits. In a row whose references are mainly of another script, it counts
letters of any script, and for ROUGE-L, BLEU and token F1 each character of a script without spaces
is a word.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, zip_longest
from statistics import fmean
from typing import Any

import numpy as np

from fedpeft import evaluate_metrics
from fedpeft.errors import named_row
from fedpeft.words import AnyScript, beyond_latin, spaced

# Each metric imports sklearn, scipy, sacrebleu or rouge_score itself, because each takes up to a
# second and a run uses one or two.

Rows = Sequence[Any] | np.ndarray
Texts = list[str]
References = list[list[str]]


def accuracy(predictions: Rows, references: Rows) -> float:
    """Return the fraction of rows with the right label.

    It is computed here because importing scikit-learn takes 2 s.
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def f1(predictions: Rows, references: Rows, average: str = "binary") -> float:
    """Return F1 of one class, or its mean over the classes that occur, predicted or true.

    A class without a right prediction scores 0.

    Args:
        predictions: class numbers (rows,).
        references: right class numbers (rows,).
        average: ``binary`` for F1 of class 1, ``weighted`` to weigh classes by their rows in
            ``references``.
    """
    from sklearn.metrics import f1_score

    score = f1_score(references, predictions, average=average, zero_division=0)  # type: ignore
    return float(score)


def f1_macro(predictions: Rows, references: Rows, classes: int | None = None) -> float:
    """Return the mean of F1 over all classes of the task, each weighed alike.

    A class without a right prediction scores 0, also if it does not occur. So a client with rows of
    one class out of four scores 0.25 at the most, and all clients' numbers have one scale.

    Args:
        predictions: class numbers (rows,).
        references: right class numbers (rows,).
        classes: number of the task's classes; null for those that occur, predicted or true.
    """
    from sklearn.metrics import f1_score

    labels = None if classes is None else range(classes)
    score = f1_score(references, predictions, labels=labels, average="macro", zero_division=0)  # type: ignore
    return float(score)


def matthews(predictions: Rows, references: Rows) -> float:
    """Return Matthews' correlation of any number of classes, -1 to 1; 0 if a side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(predictions)) == 1 or len(np.unique(references)) == 1:
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def correlation(predictions: Rows, references: Rows, kind: str) -> float:
    """Return a correlation, from -1 to 1; 0 if a side is constant to 11 digits.

    Args:
        predictions: numbers (rows,).
        references: right numbers (rows,).
        kind: ``pearson`` or ``spearman``.

    Raises:
        ValueError: a number is not finite.
    """
    from scipy import stats

    pair = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    if not np.isfinite(pair).all():
        raise ValueError(f"values of {kind} must be finite, got nan or inf")
    if any(np.ptp(values) <= 1e-11 * np.abs(values).max() for values in pair):
        return 0.0
    return float({"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind](*pair).statistic)


def bleu4(predictions: Texts, references: References) -> float:
    """Return corpus BLEU, 0 to 1: tokenizer 13a, case kept, up to 4-grams, exponential smoothing.

    Rows may differ in their number of references. If no prediction has a 4-gram, the score is 0,
    even if all are right. Chinese is split as by sacrebleu's tokenizer zh.
    """
    from sacrebleu import corpus_bleu

    others = [beyond_latin(row) for row in references]
    predictions = [spaced(t) if o else t for t, o in zip(predictions, others, strict=True)]
    references = [
        list(map(spaced, row)) if other else row
        for row, other in zip(references, others, strict=True)
    ]
    columns = list(zip_longest(*references))  # None where a row has fewer than another
    return min(1.0, corpus_bleu(predictions, columns, tokenize="13a", force=True).score / 100)


def rouge_l(predictions: Texts, references: References) -> float:
    """Return ROUGE-L's F-measure without stemmer: best reference of a row, mean over the rows.

    Words are runs of a-z and 0-9 after lower-casing. Where the references are mainly of another
    script, they are those of ``AnyScript``.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    latin = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))
    other = RougeScorer(["rougeL"], tokenizer=AnyScript())
    pairs = zip(predictions, references, strict=True)
    return fmean(
        (other if beyond_latin(row) else latin).score_multi(row, text)["rougeL"].fmeasure
        for text, row in pairs
    )


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if the normalized texts are equal, also if both are empty, else 0."""
    return float(normalized(prediction) == normalized(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Return F1 of the normalized words, repeats counted; 0 if a side has none, as in v1.1."""
    texts = [normalized(prediction), normalized(reference)]
    if beyond_latin([reference]):
        texts = list(map(spaced, texts))
    ours, theirs = (text.split() for text in texts)
    same = (Counter(ours) & Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def normalized(text: str) -> str:
    """Return a text in SQuAD v1.1's normal form.

    It is lower case, without ASCII punctuation, then without articles, with single spaces.
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def mean_best(predictions: Texts, references: References, score: Callable[..., float]) -> float:
    """Return the mean over the rows of the best score over a row's references.

    Args:
        predictions: texts (rows,).
        references: lists of right texts (rows,).
        score: maps a prediction and a reference to a number.
    """
    pairs = zip(predictions, references, strict=True)
    return fmean(max(score(text, reference) for reference in row) for text, row in pairs)


LABELS = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "f1_weighted": partial(f1, average="weighted"),
    "matthews": matthews,
}
NUMBERS = {name: partial(correlation, kind=name) for name in ("spearman", "pearson")}
TEXTS = {
    "bleu4": bleu4,
    "rouge_l": rouge_l,
    "exact_match": partial(mean_best, score=exact_match),
    "token_f1": partial(mean_best, score=token_f1),
}
MEASURES: dict[str, Callable[..., float]] = LABELS | NUMBERS | TEXTS


MODULES = "a module of evaluate, such as /folder/my_metric or evaluate:NAME"


def measure(name: str, predictions: Rows, references: Rows, classes: int | None = None) -> float:
    """Return a metric of predictions.

    Args:
        name: one of ``MEASURES``, or a module's name as ``evaluate_metrics`` takes it.
        predictions: labels, numbers or texts, (rows,).
        references: right labels, numbers or texts; for text metrics also lists of texts, (rows,).
        classes: number of the task's classes, over which ``f1_macro`` is the mean; null for those
            that occur.

    Returns:
        A value from 0 to 1 for labels and texts, from -1 to 1 for correlations, any for a module.

    Raises:
        ValueError: there is no such metric, or it does not take such rows, or there are no rows.
    """
    ours = name in MEASURES
    if not ours and evaluate_metrics.named(name) is None:
        raise ValueError(
            f"unknown metric {name}, must be one of {', '.join(MEASURES)}, or {MODULES}"
        )
    if not len(predictions) == len(references) > 0:
        counts = f"{len(predictions)} predictions and {len(references)} references"
        raise ValueError(f"{name} needs as many references as predictions, 1 or more, got {counts}")
    if name in TEXTS:
        predictions, references = _texts(name, predictions, references)
    if name == "f1_macro":
        return f1_macro(predictions, references, classes)
    score = MEASURES[name] if ours else partial(evaluate_metrics.score, name)
    return score(predictions, references)


def _texts(name: str, predictions: Rows, references: Rows) -> tuple[Texts, References]:
    """Return texts and lists of references, checked to be str."""
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    if [] in rows:
        raise ValueError(
            f"{name} needs at least 1 reference a row, got 0 in {named_row(rows.index([]))}"
        )
    for text in chain(predictions, *rows):
        if not isinstance(text, str):
            raise ValueError(f"texts of {name} must be str, got {type(text).__name__}")
    return list(predictions), rows
