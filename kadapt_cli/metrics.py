"""How good a classifier is on a set of images: what `kadapt eval` prints, and the one score a data set is compared by.

`evaluate` gives, each with a 95 % interval:

accuracy            images whose most probable class is the true one, over all images
balanced accuracy   mean of the recalls of the classes that have images
top-5               images whose true class is among the five most probable; None for 5 classes or fewer
ECE                 Σ_m |B_m| / n · |acc(B_m) − conf(B_m)|: the images are put into 15 bins B_m of equal width by their
                    top-1 probability, ((m−1)/15, m/15]; acc is the part classified right, conf the mean top-1
                    probability (expected calibration error; Guo et al., On Calibration of Modern Neural Networks, 2017)

The intervals are percentile bootstrap intervals over images: the images are drawn again with replacement, and the
2.5th and 97.5th percentile of the statistic are kept. They say how much a number depends on which images were tested,
not on the training seed. Two limits are inherent: all right or all wrong gives an interval of width zero; and the ECE
of few images is biased upward, its interval more so (that of a perfectly calibrated model lies above 0).

Equal probabilities: the class that comes first wins, in the top-1 as in the top-5.

`score` gives one number, by the name of the data set's metric:

accuracy            as above
mean-per-class      balanced accuracy, as above
11point_mAP         mean over the classes that have positives of the interpolated average precision: the mean over the
                    recalls r = 0, 0.1 … 1 of the highest precision at a recall of r or more (Everingham et al., The
                    Pascal Visual Object Classes Challenge, 2010; until 2009). It is not scikit-learn's
                    average_precision_score, which sums precisions at every step of the recall, not interpolated;
                    nor ELEVATER's, which counts a precision of 1 at r = 0 whatever the first images are
roc_auc             two classes: how often an image of class 1 has a larger score of class 1 minus class 0 than one of
                    class 0 has (area under the receiver operating characteristic)

Equal scores: images of equal score are retrieved together, so that their order does not matter; in roc_auc a pair of
equal scores counts one half.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kadapt_cli.errors import DataError, DivergedError, UsageError

METRICS = ("accuracy", "mean-per-class", "11point_mAP", "roc_auc")
ECE_BINS = 15
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value as a fraction in [0, 1] and the ends of its 95 % interval; low <= value <= high."""

    value: float
    low: float
    high: float


class ClassRecall(NamedTuple):
    """One class: its name, its number of images, and the part of them classified right (None without images)."""

    name: str
    n: int
    recall: Interval | None


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found. `confusion` is (C, C) int64: rows are the true classes, columns the predicted ones."""

    accuracy: Interval
    balanced_accuracy: Interval
    top5: Interval | None
    ece: Interval
    per_class: list[ClassRecall]
    confusion: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists, numbers and None, ready for `json.dumps`."""
        return {
            "accuracy": asdict(self.accuracy),
            "balanced_accuracy": asdict(self.balanced_accuracy),
            "top5": asdict(self.top5) if self.top5 else None,
            "ece": asdict(self.ece),
            "per_class": [
                {"name": row.name, "n": row.n, "recall": asdict(row.recall) if row.recall else None}
                for row in self.per_class
            ],
            "confusion": self.confusion.tolist(),
        }


@dataclass(frozen=True)
class MultiLabel:
    """What can be said of images with several labels: the score by a metric, in [0, 1], of so many images."""

    metric: str
    score: float
    images: int

    def to_json(self) -> dict[str, Any]:
        """The same as a plain dict."""
        return asdict(self)


def within_one_error(accuracy: float, best: float, images: int) -> bool:
    """Whether validation on so many images cannot tell an accuracy from the best one: one standard error apart or less.

    The error is that of the difference of two accuracies, √(2p(1 − p)/n), where p is `best` with one right and one
    wrong image added, so that it is never zero: 0.26 of 5 images at 60 %, 0.01 of 5,000. With few images the highest
    accuracy is luck and comes early; of epochs that cannot be told apart the latest is taken, in the spirit of the
    one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984).
    """
    part = (best * images + 1) / (images + 2)
    return bool(accuracy >= best - (2 * part * (1 - part) / (images + 2)) ** 0.5)


class _Outcomes(NamedTuple):
    """What each of n images adds to the statistics; every field has shape (n,)."""

    label: NDArray[np.int64]
    right: NDArray[np.bool_]
    in_top5: NDArray[np.bool_]
    bin: NDArray[np.int64]
    gap: NDArray[np.float64]  # right − top-1 probability


def evaluate(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """Compute every metric and its bootstrap interval.

    The same seed gives the same intervals; the values do not depend on it. Time is O(n · (C + resamples)): under two
    seconds for 10,000 images of 100 classes.

    Args:
        probabilities: (n, C), probabilities in [0, 1] (softmax outputs).
        labels: (n,), indices into `classes`.
        classes: The C class names.
        resamples: Bootstrap draws.
        seed: Seed of the bootstrap draws.

    Raises:
        ValueError: No images, shapes that do not fit, values that are no probabilities, or labels out of range.
    """
    _check(probabilities, labels, classes, resamples)
    n, n_classes = probabilities.shape
    outcomes, predicted = _outcomes(probabilities, labels)
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, 4))
    for i in range(resamples):
        weights = np.bincount(rng.integers(n, size=n), minlength=n)
        draws[i] = _statistics(outcomes, weights, n_classes)
    values = _statistics(outcomes, np.ones(n, dtype=np.int64), n_classes)
    accuracy, balanced, top5, ece = (_interval(value, draws[:, i]) for i, value in enumerate(values))
    confusion = np.bincount(n_classes * labels + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    per_class = _recalls(confusion, classes, resamples, rng)
    return Metrics(accuracy, balanced, top5 if n_classes > 5 else None, ece, per_class, confusion)


def _check(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], classes: Sequence[str], resamples: int
) -> None:
    if len(labels) == 0:
        raise ValueError("evaluate: expected at least one image, 0 were given; check the split")
    expected = (len(labels), len(classes))
    if probabilities.shape != expected or labels.ndim != 1:
        raise ValueError(
            f"evaluate: expected probabilities of shape (images, classes) = {expected}, {probabilities.shape} was given"
            f" with labels of shape {labels.shape}"
        )
    if not (probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-6):  # NaN fails both
        raise ValueError(
            "evaluate: expected probabilities in [0, 1], other numbers were given; apply softmax to logits"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"evaluate: expected integer labels in 0..{len(classes) - 1}, {labels.dtype} labels in"
            f" {labels.min()}..{labels.max()} were given"
        )
    if resamples < 1:
        raise ValueError(f"evaluate: expected resamples >= 1, {resamples} was given")


def _outcomes(p: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[_Outcomes, NDArray[np.int64]]:
    """What each image adds to the statistics, and the predicted classes (n,)."""
    predicted = p.argmax(axis=1)
    confidence = p.max(axis=1)
    right = predicted == labels
    of_label = p[np.arange(len(p)), labels][:, None]
    is_earlier = np.arange(p.shape[1]) < labels[:, None]
    better = ((p > of_label) | ((p == of_label) & is_earlier)).sum(axis=1)
    bins = np.digitize(confidence, np.arange(1, ECE_BINS) / ECE_BINS, right=True)
    return _Outcomes(labels, right, better < 5, bins, right - confidence), predicted


def _statistics(images: _Outcomes, weights: NDArray[np.int64], n_classes: int) -> tuple[float, float, float, float]:
    """Accuracy, balanced accuracy, top-5 and ECE of the images when image i counts weights[i] times."""
    n = weights.sum()
    totals = np.bincount(images.label, weights, n_classes)
    hits = np.bincount(images.label, weights * images.right, n_classes)
    has_images = totals > 0
    balanced = (hits[has_images] / totals[has_images]).mean()
    # Σ over a bin of (right − confidence) is |B_m| · (acc − conf): no need for either mean.
    ece = np.abs(np.bincount(images.bin, weights * images.gap)).sum() / n
    return float(hits.sum() / n), float(balanced), float(weights @ images.in_top5 / n), float(ece)


def _recalls(
    confusion: NDArray[np.int64], classes: Sequence[str], resamples: int, rng: np.random.Generator
) -> list[ClassRecall]:
    """Recall a class. To draw its n images again with replacement is to draw from Binomial(n, recall)."""
    rows = []
    for name, n, right in zip(classes, confusion.sum(axis=1), confusion.diagonal(), strict=True):
        recall = _interval(right / n, rng.binomial(n, right / n, resamples) / n) if n else None
        rows.append(ClassRecall(name, int(n), recall))
    return rows


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # The ECE of a resample is larger on average than that of the images: without min, low may exceed the value.
    return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))


def score(name: str, values: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any] | np.floating[Any]]) -> float:
    """The metric of a data set, in [0, 1]; the module's docstring has the definitions. Time is O(C · n log n).

    Args:
        name: One of `METRICS`.
        values: (n, C), logits or probabilities.
        labels: (n,) integers in 0..C-1; or (n, C) zeros and ones for "11point_mAP", any number of ones an image.

    Raises:
        DataError: The labels cannot have this metric.
        DivergedError: A value is infinite or not a number.
        UsageError: No such metric.
        ValueError: Shapes that do not fit, or labels out of range.
    """
    if name not in METRICS:
        raise UsageError(f"metric: one of {', '.join(METRICS)} was expected, {name!r} given")
    _check_score(name, values, labels)
    if not np.isfinite(values).all():
        raise DivergedError(f"{name}: finite values were expected of the model, others given; lower the learning rate")
    if name == "11point_mAP":
        classes = [_eleven_points(s, y == 1) for s, y in zip(values.T, labels.T, strict=True) if y.any()]
        if not classes:
            raise DataError(f"{name}: one positive label or more was expected, 0 given; choose another split")
        return float(np.mean(classes))
    if name == "roc_auc":
        return _roc_auc(values.astype(np.float64), labels.astype(np.int64))
    right = values.argmax(axis=1) == labels
    if name == "accuracy":
        return float(right.mean())
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def _check_score(name: str, values: NDArray[Any], labels: NDArray[Any]) -> None:
    if len(labels) == 0:
        raise DataError(f"{name}: one image or more was expected, 0 given; choose another split")
    is_multi, wants_multi = labels.ndim == 2, name == "11point_mAP"
    if is_multi != wants_multi:
        kinds = ("one label an image", "several labels an image (multi-label)")
        mend = "choose 11point_mAP" if is_multi else f"choose one of {', '.join(METRICS[:2])}"
        raise DataError(f"{name}: {kinds[wants_multi]} was expected, {kinds[is_multi]} given; {mend}")
    if values.ndim != 2 or labels.shape != (values.shape if is_multi else values.shape[:1]):
        raise ValueError(f"{name}: values of shape {values.shape} do not fit labels of shape {labels.shape}")
    top = 1 if is_multi else values.shape[1] - 1
    if labels.min() < 0 or labels.max() > top or (labels % 1).any():
        raise ValueError(f"{name}: expected labels in 0..{top}, labels in {labels.min()}..{labels.max()} were given")
    if name == "roc_auc" and values.shape[1] != 2:
        raise DataError(
            f"{name}: two classes were expected, {values.shape[1]} given; choose accuracy or mean-per-class"
        )


def _eleven_points(scores: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> float:
    """The interpolated average precision of one class that has positives; both arguments have shape (n,)."""
    order = np.argsort(-scores)
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan))  # the last image of each run of equal scores
    hits = positive[order].cumsum()[ends]
    best = np.maximum.accumulate((hits / (ends + 1))[::-1])[::-1]
    # Whole numbers: hits / positives >= 0.3 would miss 3 of 10, as 0.3 is not exact.
    return float(best[np.searchsorted(10 * hits, np.arange(11) * positive.sum())].mean())


def _roc_auc(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    scores = values[:, 1] - values[:, 0]
    positive, negative = scores[labels == 1], np.sort(scores[labels == 0])
    if not (len(positive) and len(negative)):
        raise DataError(f"roc_auc: images of both classes were expected, of class {labels[0]} alone given")
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))
