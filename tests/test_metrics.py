"""The metrics equal scikit-learn's and the written definitions; their intervals cover the truth as they say."""

import json
import math
import time
import warnings

import numpy as np
import pytest
import sklearn.metrics
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from kadapt_cli.errors import DataError, DivergedError, UsageError
from kadapt_cli.metrics import ECE_BINS, METRICS, Interval, Metrics, evaluate, score, within_one_error


def names(n):
    return [f"class {i}" for i in range(n)]


def random_case(seed):
    """Probabilities with many ties and labels that lack about half of the classes; 2..12 classes, 1..60 images."""
    rng = np.random.default_rng(seed)
    n, n_classes = int(rng.integers(1, 61)), int(rng.integers(2, 13))
    probabilities = rng.dirichlet(np.ones(n_classes), size=n)
    if seed % 2:
        probabilities = probabilities.round(1)
    present = rng.permutation(n_classes)[: max(1, n_classes // 2)] if seed % 3 else np.arange(n_classes)
    return probabilities, rng.choice(present, size=n)


def intervals(metrics):
    found = [metrics.accuracy, metrics.balanced_accuracy, metrics.top5, metrics.ece]
    return [interval for interval in found + [row.recall for row in metrics.per_class] if interval]


def slow_ece(probabilities, labels):
    """Guo et al. (2017), equation 3, bin by bin; bin m is ((m-1)/15, m/15]."""
    total = 0.0
    for m in range(1, ECE_BINS + 1):
        inside = [
            (max(row), list(row).index(max(row)) == label)
            for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
            if (m - 1) / ECE_BINS < max(row) <= m / ECE_BINS
        ]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(top for top, _ in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def test_equals_scikit_learn_with_ties_and_absent_classes():
    absent = 0
    for seed in range(200):
        p, labels = random_case(seed)
        n_classes = p.shape[1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = evaluate(p, labels, names(n_classes), resamples=3)
        predicted = p.argmax(axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            balanced = balanced_accuracy_score(labels, predicted)
        assert abs(ours.accuracy.value - accuracy_score(labels, predicted)) < 1e-12
        assert abs(ours.balanced_accuracy.value - balanced) < 1e-12
        recalls = recall_score(labels, predicted, labels=range(n_classes), average=None, zero_division=math.nan)
        for row, recall, n in zip(ours.per_class, recalls, np.bincount(labels, minlength=n_classes), strict=True):
            absent += row.recall is None
            assert row.n == n
            assert math.isnan(recall) if row.recall is None else abs(row.recall.value - recall) < 1e-12
        if n_classes > 5:
            # Of equal scores scikit-learn takes the last class, we the first: the same with the classes reversed.
            top5 = top_k_accuracy_score(n_classes - 1 - labels, p[:, ::-1], k=5, labels=range(n_classes))
            assert abs(ours.top5.value - top5) < 1e-12
        counted = [[sum((labels == i) & (predicted == j)) for j in range(n_classes)] for i in range(n_classes)]
        assert ours.confusion.tolist() == counted
    assert absent > 100


def test_ece_equals_its_definition():
    for seed in range(100):
        p, labels = random_case(seed)
        assert abs(evaluate(p, labels, names(p.shape[1]), resamples=1).ece.value - slow_ece(p, labels)) < 1e-12


def test_ece_by_hand():
    """0.6 = 9/15 belongs to the bin below that edge, 0.62 to the next: (2·|1/2 − 0.6| + |1 − 0.62|) / 3."""
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.62, 0.38]])
    assert evaluate(p, np.array([0, 1, 0]), names(2)).ece.value == pytest.approx(0.58 / 3, abs=1e-12)


def test_first_of_equal_classes_wins():
    p = np.full((8, 8), 1 / 8)
    metrics = evaluate(p, np.arange(8), names(8))
    assert metrics.accuracy.value == 1 / 8
    assert metrics.top5.value == 5 / 8


@pytest.mark.parametrize(("n_classes", "is_defined"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(n_classes, is_defined):
    metrics = evaluate(np.eye(n_classes), np.arange(n_classes), names(n_classes))
    assert (metrics.top5 is not None) == is_defined
    assert (metrics.to_json()["top5"] is not None) == is_defined


def test_intervals_cover_the_truth():
    """200 sets of 200 images; accuracy 0.8, balanced accuracy 0.7, recall 0.9, ECE 0.18: each in 90..99 % of them."""
    rng = np.random.default_rng(0)
    class_of, recall_of = np.array([0.6, 0.3, 0.1]), np.array([0.9, 0.7, 0.5])
    truth = {"accuracy": class_of @ recall_of, "balanced": recall_of.mean(), "recall": 0.9}
    truth["ece"] = 0.98 - truth["accuracy"]
    covered = dict.fromkeys(truth, 0)
    for i in range(200):
        labels = rng.choice(3, size=200, p=class_of)
        predicted = np.where(rng.random(200) < recall_of[labels], labels, (labels + 1) % 3)
        p = np.full((200, 3), 0.01)
        p[np.arange(200), predicted] = 0.98
        found = evaluate(p, labels, names(3), resamples=400, seed=i)
        shown = (found.accuracy, found.balanced_accuracy, found.per_class[0].recall, found.ece)
        for (name, value), interval in zip(truth.items(), shown, strict=True):
            covered[name] += interval.low <= value <= interval.high
    assert all(180 <= count <= 198 for count in covered.values()), covered


def test_ece_of_a_calibrated_model_is_biased_upward():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, size=300)
    p = np.stack([confidence, 1 - confidence], axis=1)
    ece = evaluate(p, (rng.random(300) > confidence).astype(int), names(2)).ece
    assert ece.low > 0
    assert (ece.low + ece.high) / 2 > ece.value


@pytest.mark.parametrize("resamples", [1, 20])
def test_value_lies_within_its_interval(resamples):
    for seed in range(50):
        p, labels = random_case(seed)
        for interval in intervals(evaluate(p, labels, names(p.shape[1]), resamples=resamples)):
            assert 0 <= interval.low <= interval.value <= interval.high <= 1 + 1e-12


def test_all_right_has_no_width():
    metrics = evaluate(np.eye(3)[[0, 1, 1]], np.array([0, 1, 1]), names(3))
    assert metrics.accuracy == metrics.balanced_accuracy == Interval(1.0, 1.0, 1.0)
    assert metrics.per_class[2] == ("class 2", 0, None)


def test_seed_decides_the_intervals_and_only_those():
    rng = np.random.default_rng(5)
    p, labels = rng.dirichlet(np.ones(7), size=80), rng.integers(7, size=80)
    first, again, other = (evaluate(p, labels, names(7), seed=seed) for seed in (1, 1, 2))
    assert first.to_json() == again.to_json()
    assert first.to_json() != other.to_json()
    assert [i.value for i in intervals(first)] == [i.value for i in intervals(other)]


def test_to_json_is_plain_and_complete():
    p, labels = np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]]), np.array([0, 1])
    metrics = evaluate(p, labels, ["ant", "bee", "cat"])
    found = metrics.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["accuracy", "balanced_accuracy", "top5", "ece", "per_class", "confusion"]
    assert found["accuracy"] == {"value": 0.5, "low": metrics.accuracy.low, "high": metrics.accuracy.high}
    assert found["per_class"][0] == {"name": "ant", "n": 1, "recall": {"value": 1.0, "low": 1.0, "high": 1.0}}
    assert found["per_class"][2] == {"name": "cat", "n": 0, "recall": None}
    assert found["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_inputs_are_not_changed():
    p, labels = random_case(4)
    before = p.copy(), labels.copy()
    evaluate(p, labels, names(p.shape[1]), resamples=2)
    assert (p == before[0]).all()
    assert (labels == before[1]).all()


def test_ten_thousand_images_of_a_hundred_classes_take_under_two_seconds():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(100), size=10_000), rng.integers(100, size=10_000)
    start = time.process_time()
    assert isinstance(evaluate(p, labels, names(100)), Metrics)
    assert time.process_time() - start < 2


GOOD = np.array([[0.5, 0.5], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("probabilities", "labels", "resamples", "message"),
    [
        (np.empty((0, 2)), np.empty(0, dtype=int), 10, "at least one image, 0 were given"),
        (GOOD, np.array([0]), 10, r"shape \(images, classes\) = \(1, 2\), \(2, 2\) was given"),
        (GOOD, np.array([[0], [1]]), 10, r"labels of shape \(2, 1\)"),
        (GOOD[:, :1], np.array([0, 0]), 10, r"= \(2, 2\), \(2, 1\) was given"),
        (GOOD * 9, np.array([0, 1]), 10, r"\[0, 1\], other numbers were given; apply softmax"),
        (GOOD - 1, np.array([0, 1]), 10, r"\[0, 1\], other numbers were given"),
        (GOOD * math.nan, np.array([0, 1]), 10, r"\[0, 1\], other numbers were given"),
        (GOOD, np.array([0, 2]), 10, r"labels in 0..1, int64 labels in 0..2"),
        (GOOD, np.array([-1, 0]), 10, r"labels in 0..1, int64 labels in -1..0"),
        (GOOD, np.array([0.0, 1.0]), 10, r"integer labels in 0..1, float64 labels"),
        (GOOD, np.array([0, 1]), 0, r"resamples >= 1, 0 was given"),
    ],
)
def test_wrong_input_is_named(probabilities, labels, resamples, message):
    with pytest.raises(ValueError, match=f"^evaluate: expected .*{message}"):
        evaluate(probabilities, labels, ["ant", "bee"], resamples=resamples)


@pytest.mark.parametrize(
    ("accuracy", "best", "images", "within"),
    [
        (0.4, 0.6, 5, True),  # one image of five is no evidence: the error is 0.26 at a smoothed 4/7
        (0.2, 0.6, 5, False),
        (0.591, 0.6, 5000, True),
        (0.589, 0.6, 5000, False),
        (0.8, 1.0, 5, False),
        (1.0, 1.0, 5, True),
        (0.0, 0.0, 5, True),
    ],
)
def test_within_one_error(accuracy, best, images, within):
    assert within_one_error(accuracy, best, images) is within


# --- one score by the name of its metric ---


def slow_eleven_points(scores, positive):
    """Everingham et al. (2010), section 4.2, in whole numbers; images of equal score are retrieved together."""
    found = []
    for tenths in range(11):
        precisions = [0.0]
        for threshold in set(scores):
            retrieved = [bool(hit) for value, hit in zip(scores, positive, strict=True) if value >= threshold]
            if 10 * sum(retrieved) >= tenths * sum(positive):
                precisions.append(sum(retrieved) / len(retrieved))
        found.append(max(precisions))
    return sum(found) / 11


def test_score_equals_scikit_learn_with_ties_and_absent_classes():
    aucs = 0
    for seed in range(200):
        p, labels = random_case(seed)
        predicted = p.argmax(axis=1)
        assert score("accuracy", p, labels) == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            balanced = balanced_accuracy_score(labels, predicted)
        assert score("mean-per-class", p.astype(np.float32), labels) == pytest.approx(balanced, abs=1e-12)
        logits, binary = p[:, :2], labels % 2
        if len(set(binary)) == 2:
            expected = sklearn.metrics.roc_auc_score(binary, logits[:, 1] - logits[:, 0])
            assert score("roc_auc", logits, binary) == pytest.approx(expected, abs=1e-12)
            aucs += 1
    assert aucs > 100


def test_eleven_points_equals_its_definition_with_ties_and_classes_without_positives():
    absent = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        n, n_classes = int(rng.integers(1, 31)), int(rng.integers(2, 6))
        labels = (rng.random((n, n_classes)) < 0.1).astype(np.float32)
        labels[0, 0] = 1
        values = rng.normal(size=(n, n_classes)).round(seed % 3).astype(np.float32)
        has = labels.any(axis=0)
        absent += not has.all()
        aps = [slow_eleven_points(values[:, c].tolist(), labels[:, c].tolist()) for c in np.flatnonzero(has)]
        found = score("11point_mAP", values, labels)
        assert found == pytest.approx(sum(aps) / len(aps), abs=1e-12)
        assert score("11point_mAP", values[::-1], labels[::-1]) == found
    assert absent > 50


def test_eleven_points_by_hand():
    """Positives at ranks 1, 3 and 6: precision 1 up to a recall of 1/3, 2/3 up to 2/3, 1/2 up to 1."""
    values, labels = -np.arange(200.0).reshape(100, 2), np.zeros((100, 2), int)
    labels[[0, 2, 5], 0] = 1
    expected = (4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11
    assert score("11point_mAP", values, labels) == pytest.approx(expected, abs=1e-15)
    another = sklearn.metrics.average_precision_score(labels[:, 0], values[:, 0])
    assert another == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert score("11point_mAP", values[:2], labels[:2][::-1]) == 0.5, "no precision of 1 at a recall of 0"
    labels[[0, 1, 2, *range(93, 100)], 0], labels[5, 0] = 1, 0
    expected = (4 * 1 + 7 * 10 / 100) / 11
    assert score("11point_mAP", values, labels) == pytest.approx(expected, abs=1e-15), "a recall of 3/10 is 0.3"


def test_equal_scores():
    """The first of equal classes wins, images are retrieved together, a pair is half right."""
    assert score("accuracy", np.zeros((2, 2)), np.array([0, 1])) == 0.5
    assert score("mean-per-class", np.zeros((4, 3)), np.array([0, 0, 0, 2])) == 0.5
    assert score("11point_mAP", np.array([[1.0, 0], [1, 0], [0, 0]]), np.array([[1, 0], [0, 0], [0, 0]])) == 0.5
    assert score("roc_auc", np.array([[0, 5.0], [9, 0], [9, 0]]), np.array([1, 0, 1])) == 0.75


ONE, TWO = np.array([0, 1]), np.array([[1, 1], [0, 1]])


@pytest.mark.parametrize(
    ("name", "values", "labels", "kind", "message"),
    [
        ("f1", GOOD, ONE, UsageError, f"^metric: one of {', '.join(METRICS)} was expected, 'f1' given$"),
        ("11point_mAP", GOOD, ONE, DataError, r"several labels an image \(multi-label\) was expected, one label an"),
        ("accuracy", GOOD, TWO, DataError, r"one label an image was expected, several labels.*choose 11point_mAP"),
        ("11point_mAP", GOOD, TWO * 0, DataError, "one positive label or more was expected, 0 given"),
        ("roc_auc", np.eye(3), np.arange(3), DataError, "two classes were expected, 3 given"),
        ("roc_auc", GOOD, ONE * 0 + 1, DataError, "images of both classes were expected, of class 1 alone given"),
        ("accuracy", GOOD[:0], ONE[:0], DataError, "one image or more was expected, 0 given"),
        ("accuracy", GOOD - math.inf, ONE, DivergedError, "finite values were expected"),
        ("accuracy", GOOD, ONE[:1], ValueError, r"shape \(2, 2\) do not fit labels of shape \(1,\)"),
        ("accuracy", GOOD, ONE + 1, ValueError, "labels in 0..1, labels in 1..2"),
        ("11point_mAP", GOOD, TWO / 2, ValueError, "labels in 0..1"),
    ],
)
def test_a_score_that_cannot_be_had_is_named(name, values, labels, kind, message):
    with pytest.raises(kind, match=message) as caught:
        score(name, values, labels)
    assert "\n" not in str(caught.value)
