"""F1 over scikit-learn: predicted and true class indices."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """F1 of class 1 of two classes (as in GLUE), else the mean over the classes, in points.

    An item's score is whether its class is right: F1 is no mean over items.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 in points",
            citation="scikit-learn, sklearn.metrics.f1_score",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        average = "binary" if set(predictions) | set(references) <= {0, 1} else "macro"
        value = 100 * f1_score(references, predictions, average=average, zero_division=0)
        return {"value": value, "items": [p == r for p, r in zip(predictions, references)]}  # noqa: B905
