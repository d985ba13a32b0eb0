"""Metrics as local `evaluate.Metric` modules; each yields its value in points and a score per item.

Made local because evaluate's own metric scripts are loaded from the hub; the mathematics is that of
well-kept libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ballast.errors import DataError


def score(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> tuple[float, list]:
    """Value in points (0 to 100, higher is better) and the items' scores (0 to 1).

    Raises DataError for an unknown metric.
    """
    from ballast.metrics.accuracy import Accuracy
    from ballast.metrics.exact_match import ExactMatch
    from ballast.metrics.f1 import F1
    from ballast.metrics.masked_token import MaskedTokenAccuracy
    from ballast.metrics.matthews import MatthewsCorrelation
    from ballast.metrics.next_token import NextTokenAccuracy
    from ballast.metrics.rouge_l import RougeL

    known = {
        "accuracy": Accuracy,
        "exact_match": ExactMatch,
        "f1": F1,
        "masked_token_accuracy": MaskedTokenAccuracy,
        "matthews_correlation": MatthewsCorrelation,
        "next_token_accuracy": NextTokenAccuracy,
        "rouge_l": RougeL,
    }
    if name not in known:
        raise DataError(f"metric {name!r}; allowed: {', '.join(sorted(known))}")
    metric = known[name](keep_in_memory=True)
    result = metric.compute(predictions=list(predictions), references=list(references))
    return float(result["value"]), [float(item) for item in result["items"]]
