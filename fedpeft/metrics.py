"""Metrics of labels, numbers and texts, computed without network; and any that evaluate loads.

Sources: BLEU by sacrebleu (https://aclanthology.org/W18-6319), ROUGE-L by rouge_score
(https://aclanthology.org/W04-1013), exact match and token F1 as in SQuAD v1.1's official script
(https://arxiv.org/abs/1606.05250), the others by scikit-learn and scipy.
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

Rows = Sequence[Any] | np.ndarray
Texts = list[str]
References = list[list[str]]


def accuracy(predictions: Rows, references: Rows) -> float:
    """Fraction of rows with the right label; importing scikit-learn for it would take 2 s."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def f1(predictions: Rows, references: Rows, average: str = "binary") -> float:
    """F1 of class 1 (``binary``), or its mean over the classes that occur, predicted or true.

    ``macro`` weighs them alike, ``weighted`` by their rows in ``references``. A class without a
    right prediction scores 0.
    """
    from sklearn.metrics import f1_score

    score = f1_score(references, predictions, average=average, zero_division=0)  # type: ignore
    return float(score)


def matthews(predictions: Rows, references: Rows) -> float:
    """Matthews' correlation, from -1 to 1, of any number of classes; 0 if either is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(predictions)) == 1 or len(np.unique(references)) == 1:
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def correlation(predictions: Rows, references: Rows, kind: str) -> float:
    """Pearson's or Spearman's, from -1 to 1; 0 where either is constant, to 11 digits."""
    from scipy import stats

    pair = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    if not np.isfinite(pair).all():
        raise ValueError(f"values of {kind} must be finite, got nan or inf")
    if any(np.ptp(values) <= 1e-11 * np.abs(values).max() for values in pair):
        return 0.0
    return float({"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind](*pair).statistic)


def bleu4(predictions: Texts, references: References) -> float:
    """Corpus BLEU from 0 to 1: tokenizer 13a, case kept, up to 4-grams, exponential smoothing.

    Rows may differ in their number of references. Predictions without a 4-gram among them all
    score 0, even if they are right.
    """
    from sacrebleu import corpus_bleu

    columns = list(zip_longest(*references))  # None where a row has fewer than another
    return min(1.0, corpus_bleu(predictions, columns, tokenize="13a", force=True).score / 100)


def rouge_l(predictions: Texts, references: References) -> float:
    """ROUGE-L's F-measure, without stemmer, the mean over the rows of the best of its references.

    Words are runs of a-z and 0-9 after lower-casing: texts in other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))
    pairs = zip(predictions, references, strict=True)
    return fmean(scorer.score_multi(row, text)["rougeL"].fmeasure for text, row in pairs)


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same normalized; 0 for an empty prediction, unlike in SQuAD's script."""
    return float(bool(prediction.strip()) and normalized(prediction) == normalized(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the normalized words, repeats counted."""
    ours, theirs = normalized(prediction).split(), normalized(reference).split()
    same = (Counter(ours) & Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def normalized(text: str) -> str:
    """SQuAD v1.1's: lower case, then no ASCII punctuation, then no articles, then single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def mean_best(predictions: Texts, references: References, score: Callable[..., float]) -> float:
    """Mean over the rows of the best score over a row's references."""
    pairs = zip(predictions, references, strict=True)
    return fmean(max(score(text, reference) for reference in row) for text, row in pairs)


LABELS = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": partial(f1, average="macro"),
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


def measure(name: str, predictions: Rows, references: Rows) -> float:
    """The metric of that name in ``MEASURES``, or of that module of ``evaluate``.

    Args:
        name: one of ``MEASURES``, or what ``evaluate_metrics`` takes.
        predictions: (rows,) of labels, numbers or str.
        references: the same; of text metrics also (rows,) of lists of one or more str.

    Returns:
        Its value; labels' and texts' from 0 to 1, correlations from -1 to 1, a module's any.

    Raises:
        ValueError: No such metric, or rows that it does not take, such as none at all.
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
    score = MEASURES[name] if ours else partial(evaluate_metrics.score, name)
    return score(predictions, references)


def _texts(name: str, predictions: Rows, references: Rows) -> tuple[Texts, References]:
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    if [] in rows:
        raise ValueError(f"{name} needs at least 1 reference a row, got 0 in row {rows.index([])}")
    for text in chain(predictions, *rows):
        if not isinstance(text, str):
            raise ValueError(f"texts of {name} must be str, got {text!r}")
    return list(predictions), rows
