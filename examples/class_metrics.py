"""Metrics of the classification scripts, by scikit-learn."""

import numpy as np


def class_scores(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the classes, so that a rare class counts as much as a frequent one.

    Args:
        guesses, labels: numbers of classes, of the same shape.
    """
    # an extra that fine-tuning of summaries does without
    from sklearn.metrics import accuracy_score, f1_score

    f1 = f1_score(labels, guesses, average="macro", zero_division=0.0)
    return {"accuracy": float(accuracy_score(labels, guesses)), "f1": float(f1)}


def label_scores(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of several labels a row: the share of rows with all of them right, F1 as the mean over the labels, and F1 of all
    decisions together.

    Args:
        guesses, labels: bool [rows, labels].
    """
    from sklearn.metrics import accuracy_score, f1_score

    kinds = {"f1": "macro", "f1_micro": "micro"}
    f1s = {
        name: float(f1_score(labels, guesses, average=average, zero_division=0.0)) for name, average in kinds.items()
    }
    return {"accuracy": float(accuracy_score(labels, guesses)), **f1s}


def number_scores(guesses: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean squared and mean absolute error, and the share of the labels' variance that is explained, R².

    Args:
        guesses: [rows, numbers].
        labels: [rows] or [rows, numbers].
    """
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    labels = labels.reshape(guesses.shape)
    scores = {
        "mse": float(mean_squared_error(labels, guesses)), "mae": float(mean_absolute_error(labels, guesses))
    }  # fmt: skip
    # one row has no variance
    return scores | ({"r2": float(r2_score(labels, guesses))} if len(labels) > 1 else {})
