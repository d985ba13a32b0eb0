"""Exact match of generated text, over scikit-learn's accuracy of the normalised texts."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score


def normalised(text: str) -> str:
    """Text with its white space made single; case counts."""
    return " ".join(text.split())


class ExactMatch(evaluate.Metric):
    """Share of predictions equal to their reference but for white space, in points."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match in points",
            citation="scikit-learn, sklearn.metrics.accuracy_score",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        left, right = [[normalised(t) for t in texts] for texts in (predictions, references)]
        value = 100 * accuracy_score(right, left)
        return {"value": value, "items": [p == r for p, r in zip(left, right, strict=True)]}
