"""Compares generated rows with those of one table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sfumato.modalities.base import report_stage
from sfumato.modalities.table.columns import columns_from_spec, modelled, round_values, target_index
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.metrics import looks_copied, table_report
from sfumato.types import Items, Progress


class TableEvaluator:
    """Compares generated rows with those of one table.

    Args:
        train: The training part.
        device: Not used.
        progress: Called as progress(stage, done, total).
        target_column: Name of the column to predict; default the last modelled one.

    Raises:
        UserError: No modelled column has this name.
    """

    by_label = False

    def __init__(
        self,
        train: TableDataset,
        device: str | None = None,
        progress: Progress | None = None,
        target_column: str | None = None,
    ) -> None:
        columns = modelled(train.columns)
        self.train, self.progress = train, progress
        self.target = columns[target_index(target_column, columns)].name

    def report(self, fake: TableDataset, held: TableDataset, cas: bool, seed: int) -> dict[str, Any]:
        """`table_report`, with `downstream` if `cas`; and `memorised`, the result of `looks_copied`."""
        columns, target = modelled(self.train.columns), self.target if cas else None
        with report_stage(self.progress, "measure"):
            report = table_report(fake.values, self.train.values, held.values, columns, target=target, seed=seed)
        return {**report, "memorised": looks_copied(report)}

    def reconstruction_metrics(self, x: Items, x_hat: Items) -> dict[str, float]:
        """Reconstruction metrics of rows x̂ against x."""
        return cell_metrics(x.stack(), x_hat.stack(), self.train.spec)


def cell_metrics(x: Tensor, x_hat: Tensor, spec: Mapping[str, Any]) -> dict[str, float]:
    """`cells`: share of equal cells; `error`: mean absolute error of numbers relative to their range."""
    columns = modelled(columns_from_spec(spec))
    values, values_hat = (round_values(columns, v.numpy().astype(np.float64)) for v in (x, x_hat))
    equal = (values == values_hat) | (np.isnan(values) & np.isnan(values_hat))
    span = np.array([max((c.high or 0.0) - (c.low or 0.0), 1e-300) for c in columns])
    numbers = [j for j, c in enumerate(columns) if not c.levels]
    report = {"cells": float(equal.mean())}
    if numbers:
        error = (np.abs(values - values_hat) / span)[:, numbers]
        report["error"] = float(np.nanmean(error)) if not np.isnan(error).all() else 0.0
    return report
