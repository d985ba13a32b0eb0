"""Masked-token top-1 accuracy of an encoder."""

from __future__ import annotations

import datasets
import evaluate

from ballast.metrics.next_token import NextTokenAccuracy


class MaskedTokenAccuracy(NextTokenAccuracy):
    """Share of masked tokens that the model ranks first, over all masked tokens, in points.

    predictions: tokens guessed per item; references: tokens masked per item.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Masked-token accuracy in points",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )
