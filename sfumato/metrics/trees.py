"""Classifiers and regressors of table rows: boosted trees and a linear one; and the AUC that judges them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]  # (N, D): numbers with NaN where missing, categories as indices from 0
Predict = Callable[[Any], NDArray[np.float64]]


@dataclass(frozen=True)
class Trees:
    """One way of boosting trees, with its own default settings (100 trees).

    Args:
        name: "xgboost" or "scikit-learn".
        classes: (categorical (D,), seed) -> a classifier with `fit` and `predict_proba`.
        number: The same, a regressor with `fit` and `predict`.
        levels: Most levels of a category.
    """

    name: str
    classes: Callable[[Sequence[bool], int], Any]
    number: Callable[[Sequence[bool], int], Any]
    levels: int


def find_trees() -> Trees:
    """XGBoost where it is installed, otherwise scikit-learn's histogram boosting.

    References:
        Chen and Guestrin 2016, XGBoost: A Scalable Tree Boosting System, arXiv:1603.02754.
    """
    try:
        from xgboost import XGBClassifier, XGBRegressor
    except ImportError:
        return _scikit_trees()

    def build(model: Any) -> Callable[[Sequence[bool], int], Any]:
        return lambda categorical, seed: model(
            enable_categorical=True, feature_types=["c" if c else "q" for c in categorical], random_state=seed
        )

    return Trees("xgboost", build(XGBClassifier), build(XGBRegressor), 2**31)


def _scikit_trees() -> Trees:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    def build(model: Any) -> Callable[[Sequence[bool], int], Any]:
        return lambda categorical, seed: model(
            categorical_features=list(categorical), early_stopping=False, random_state=seed
        )

    return Trees("scikit-learn", build(HistGradientBoostingClassifier), build(HistGradientBoostingRegressor), 255)


def fit_linear(x: Any, y: NDArray[np.int64]) -> Predict:
    """Logistic regression of y in {0, 1} on standardised features (N, P), dense or sparse: features -> score."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=300).fit(x, y).decision_function


def auc(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """The chance that a positive's score (N,) exceeds a negative's (M,), ties counting half: the area under the ROC."""
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def folds(y: NDArray[np.int64], count: int, seed: int) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Masks (N,) of the rows to train and to test on, `count` times, with each class dealt evenly."""
    rng, number = np.random.default_rng(seed), np.empty(len(y), np.int64)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        number[members] = np.arange(len(members)) % count
    for k in range(count):
        yield number != k, number == k
