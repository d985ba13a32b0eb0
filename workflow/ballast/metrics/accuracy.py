"""Accuracy over scikit-learn: predicted and true class indices."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """Share of items whose predicted index is the reference's, in points."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy in points",
            citation="scikit-learn, sklearn.metrics.accuracy_score",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        value = 100 * accuracy_score(references, predictions)
        return {"value": value, "items": [p == r for p, r in zip(predictions, references)]}  # noqa: B905
