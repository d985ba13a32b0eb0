"""ROUGE-L F1 of generated captions, over the rouge-score package."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer


class RougeL(evaluate.Metric):
    """Mean F1 of the longest common subsequence of words (Lin 2004), in points."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE-L F1 in points",
            citation="Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        scorer = RougeScorer(["rougeL"])
        items = [
            scorer.score(reference, prediction)["rougeL"].fmeasure
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"value": 100 * sum(items) / len(items), "items": items}
