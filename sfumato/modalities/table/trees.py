"""Classifiers and regressors of table rows: gradient-boosted trees, logistic regression; folds and the AUC."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # (N, D): numbers with NaN if missing, categories as indices from 0
Predict = Callable[[Any], NDArray[np.float64]]
Fold = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # masks (N,) of training and test rows
BuildModel = Callable[[Sequence[bool], int], Any]  # (which features (D,) are categorical, seed) -> model


@dataclass(frozen=True)
class Trees:
    """An implementation of gradient-boosted trees with its default settings (100 trees).

    Args:
        name: "xgboost" or "scikit-learn".
        classifier: Builds a classifier with `fit` and `predict_proba`.
        regressor: Builds a regressor with `fit` and `predict`.
        max_levels: Most levels of a category that it accepts.
    """

    name: str
    classifier: BuildModel
    regressor: BuildModel
    max_levels: int


def find_trees() -> Trees:
    """XGBoost if installed, else scikit-learn's histogram gradient boosting.

    References:
        Chen and Guestrin 2016, XGBoost: A Scalable Tree Boosting System, arXiv:1603.02754.
    """
    try:
        from xgboost import XGBClassifier, XGBRegressor
    except ImportError:
        return _scikit_trees()

    def builder(model: Any) -> BuildModel:
        return lambda categorical, seed: model(
            enable_categorical=True, feature_types=["c" if c else "q" for c in categorical], random_state=seed
        )

    return Trees("xgboost", builder(XGBClassifier), builder(XGBRegressor), 2**31)


def _scikit_trees() -> Trees:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    def builder(model: Any) -> BuildModel:
        return lambda categorical, seed: model(
            categorical_features=list(categorical), early_stopping=False, random_state=seed
        )

    return Trees("scikit-learn", builder(HistGradientBoostingClassifier), builder(HistGradientBoostingRegressor), 255)


def fit_logistic_regression(x: Any, y: NDArray[np.int64]) -> Predict:
    """Logistic regression of y in {0, 1} on standardised features (N, P), dense or sparse: features -> score."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=300).fit(x, y).decision_function


def auc(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """Area under the ROC curve: P(score of a positive (N,) > score of a negative (M,)), ties counting half."""
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / (2 * len(positive) * len(negative)))


def stratified_folds(y: NDArray[np.int64], count: int, seed: int) -> Iterator[Fold]:
    """`count` folds of the rows of y (N,), each class spread evenly over them."""
    rng, fold = np.random.default_rng(seed), np.empty(len(y), np.int64)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        fold[members] = np.arange(len(members)) % count
    for k in range(count):
        yield fold != k, fold == k
