"""Matthews correlation over scikit-learn: predicted and true class indices."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation times 100, as GLUE reports CoLA: 0 is guessing, below it is worse.

    An item's score is whether its class is right: the correlation is no mean over items.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Matthews correlation times 100",
            citation="scikit-learn, sklearn.metrics.matthews_corrcoef",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        value = 100 * matthews_corrcoef(references, predictions)
        return {"value": value, "items": [p == r for p, r in zip(predictions, references)]}  # noqa: B905
