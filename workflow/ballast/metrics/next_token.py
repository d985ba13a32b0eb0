"""Next-token top-1 accuracy of running text."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


class NextTokenAccuracy(evaluate.Metric):
    """Share of tokens that the model ranks first, over all tokens of all texts, in points.

    predictions: tokens guessed per text; references: tokens per text. The mean weighs each token
    equally; an item's score is its own share.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Next-token accuracy in points",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        hits, tokens = np.asarray(predictions), np.asarray(references)
        return {"value": 100 * hits.sum() / tokens.sum(), "items": list(hits / tokens)}
