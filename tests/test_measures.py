"""The registry of measures, those derived from a record, and the mathematics of drift."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from ballast import measures, tradeoff
from ballast.drift import geometry
from ballast.measures import (
    MEASURES,
    cgm_average,
    derived,
    forgetting_per_gain,
    headroom_gain,
    page,
    retention,
)
from fake_records import record, score

DOUBLE = torch.float64
DERIVED = {"cgm_average", "retention", "forgetting_per_gain", "headroom_gain"}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# The registry


def test_every_measure_says_everything_about_itself():
    for name, measure in MEASURES.items():
        assert measure.name == name
        texts = (measure.title, measure.formula, measure.sign, measure.unit, measure.range)
        assert all(text.strip() == text and text for text in (*texts, measure.source)), name
        assert callable(measure.function)
    assert len({m.title for m in MEASURES.values()}) == len(MEASURES)
    assert len({m.function for m in MEASURES.values()}) == len(MEASURES)


def test_the_registry_has_what_records_hold():
    levels = {name: m.level for name, m in MEASURES.items()}
    assert set(tradeoff.MEASURES) | DERIVED < set(levels)
    assert all(levels[name] == "record" for name in {*tradeoff.MEASURES, *DERIVED})
    assert set(derived(record())) == DERIVED
    assert MEASURES["kl"].column == "drift.kl"
    assert MEASURES["E"].column == "E"
    assert MEASURES["delta_ce"].column == "dce.TASK"


def test_the_page_is_a_table_of_all_of_them():
    lines = page().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {9}
    for measure in MEASURES.values():
        (line,) = (row for row in tables if row.startswith(f"| `{measure.column}` |"))
        assert f"| {measure.title} |" in line
        assert measure.formula.replace("|", "\\|") in line
    assert "### Of several cells" not in page()  # no measure yet, no empty table


def test_reading_the_registry_costs_no_torch():
    code = "import sys, ballast.measures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Of a record


def test_cgm_average_is_the_mean_over_all_tasks():
    upstream = [61.0, 40.5, 88.25, 12.0]
    source = sum(upstream) / 4
    assert cgm_average(30.0, source, 4) == pytest.approx(sum([30.0, *upstream]) / 5)
    assert cgm_average(30.0, None, 0) is None
    assert cgm_average(None, 30.0, 1) is None


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_quotients_have_no_value_where_their_denominator_is_noise(noise):
    for function in (retention, headroom_gain):
        at = noise if function is retention else 100 - noise
        beyond = at + 0.1 if function is retention else at - 0.1
        assert function(5.0, at, noise) is None
        assert function(5.0, beyond, noise) is not None
        assert function(None, beyond, noise) is None
        assert function(5.0, None, noise) is None
    assert forgetting_per_gain(-5.0, noise, noise) is None
    assert forgetting_per_gain(-5.0, -20.0, noise) is None  # nothing gained
    assert forgetting_per_gain(None, 20.0, noise) is None
    assert forgetting_per_gain(-5.0, noise + 0.5, noise) == pytest.approx(5 / (noise + 0.5))


def test_quotients_by_hand():
    assert retention(60.0, 80.0) == pytest.approx(75.0)
    assert forgetting_per_gain(-10.0, 40.0) == pytest.approx(0.25)
    assert forgetting_per_gain(2.0, 40.0) == pytest.approx(-0.05)
    assert headroom_gain(45.0, 10.0) == pytest.approx(50.0)
    assert headroom_gain(-5.0, 50.0) == pytest.approx(-10.0)


def test_derived_of_a_record():
    found = derived(record(e=50.0, f=-10.0))
    assert found["cgm_average"] == pytest.approx((60 + 80 + 70) / 3)
    assert found["retention"] == pytest.approx(100 * 75 / 85)
    assert found["forgetting_per_gain"] == pytest.approx(10 / 50)
    assert found["headroom_gain"] == pytest.approx(100 * 50 / 90)


def test_losses_cider_and_probes_never_join_points():
    plain = record()
    mixed = record()
    for role in ("upstream", "target"):
        name = f"captions-{role}"
        mixed["tasks"][name] = dict(plain["tasks"]["facts"], role=role, unit="cider")
        mixed["scores"][name], mixed["base_scores"][name] = score(128.5, 1.0), score(40.0, 2.0)
    assert derived(mixed) == derived(plain)
    assert tradeoff.of_record(mixed) == tradeoff.of_record(plain)
    mixed["scores"]["tales"]["value"] = mixed["scores"]["wiki"]["value"] = 99.0
    assert derived(mixed) == derived(plain)
    del mixed["tasks"]["codes"]  # now the target has CIDEr alone
    assert derived(mixed) | {"retention": 0} == dict.fromkeys(DERIVED) | {"retention": 0}
    assert derived(mixed)["retention"] == derived(plain)["retention"]


def test_the_noise_of_a_gain_is_its_standard_error_over_the_items():
    draw = np.random.default_rng(0)
    before, after = (draw.random(300) < 0.5).astype(int), (draw.random(300) < 0.54).astype(int)
    error = 100 * np.std(after - before) / math.sqrt(300)

    def found(e: float, churn: bool) -> float | None:
        made = record(f=-8.0)
        made["base_scores"]["codes"]["value"] = 100 * before.mean()
        made["scores"]["codes"]["value"] = 100 * before.mean() + e
        if churn:
            counts = {"gained": (after > before).sum(), "forgotten": (after < before).sum()}
            made["churn"] = {"codes": counts | {"n": 300}}
        return derived(made)["forgetting_per_gain"]

    assert found(error * 0.999, churn=True) is None
    assert found(error * 1.001, churn=True) == pytest.approx(8 / (error * 1.001))
    # Without its items' churn, the two scores count as independent.
    p, q = before.mean(), before.mean() + 0.04
    apart = 100 * math.sqrt((p * (1 - p) + q * (1 - q)) / 300)
    assert (found(4.0, churn=False) is None) == (apart >= 4.0)
    assert found(apart * 1.01, churn=False) is not None
    assert found(apart * 0.99, churn=False) is None


def test_a_base_that_knows_all_has_no_headroom_and_one_that_knows_nothing_no_retention():
    made = record()
    made["base_scores"]["codes"]["value"] = 99.9  # 0.1 left, standard error 0.18
    assert derived(made)["headroom_gain"] is None
    made["base_scores"]["codes"]["value"] = 99.0  # 1 left, standard error 0.57
    assert derived(made)["headroom_gain"] is not None
    for task in ("facts", "sums"):
        made["base_scores"][task]["value"] = 0.0
    assert derived(made)["retention"] is None
    for task in ("facts", "sums"):
        made["base_scores"][task]["value"] = 0.1
    assert derived(made)["retention"] is None  # within 0.13, the error of the mean of two tasks
    for task in ("facts", "sums"):
        made["base_scores"][task]["value"] = 0.2
    assert derived(made)["retention"] is not None  # beyond 0.18; of one task it were 0.26


# Predictions


def logs(tokens: int, vocabulary: int, seed: int) -> Tensor:
    return drawn(tokens, vocabulary, seed=seed).mul(3).log_softmax(-1)


def test_kl_is_torch_distributions():
    base, tuned = logs(7, 11, 1), logs(7, 11, 2)
    of = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(of(logits=base), of(logits=tuned)).mean()
    assert geometry.kl(base, tuned) == pytest.approx(float(expected), rel=1e-12)
    assert geometry.kl(base, tuned) != pytest.approx(geometry.kl(tuned, base), rel=1e-2)
    assert geometry.kl(base, base) == 0.0


def test_forgetting_loss_is_cross_entropy_and_corrected_is_kl():
    base, tuned = logs(7, 11, 1), logs(7, 11, 2)
    soft = torch.nn.functional.cross_entropy(tuned, base.exp())
    assert geometry.forgetting_loss(base, tuned) == pytest.approx(float(soft), rel=1e-12)
    entropy = scipy.stats.entropy(base.exp().numpy(), axis=1).mean()
    assert geometry.forgetting_loss(base, base) == pytest.approx(entropy, rel=1e-12)
    corrected = geometry.kl_corrected(base, tuned)
    assert corrected == pytest.approx(geometry.kl(base, tuned), rel=1e-12)
    assert geometry.kl_corrected(base, base) == 0.0


def test_impossible_tokens_do_not_count_and_rounding_is_never_negative():
    base = torch.tensor([[0.5, 0.5, 0.0]], dtype=DOUBLE).log()
    tuned = torch.tensor([[0.25, 0.75, 0.0]], dtype=DOUBLE).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert geometry.kl(base, tuned) == pytest.approx(expected)
    assert geometry.kl_corrected(base, tuned) == pytest.approx(expected)
    assert geometry.kl(tuned, torch.tensor([[1.0, 0.0, 0.0]]).log()) == math.inf
    near = logs(50, 11, 1).float()
    for shift in (1e-7, -1e-7):
        assert geometry.kl(near, near + shift) >= 0
        assert geometry.kl_corrected(near, near + shift) >= 0


# Features


@pytest.mark.parametrize(("tokens", "width"), [(9, 20), (40, 6), (12, 12)])
def test_cka_is_hsic_on_centred_gram_matrices(tokens, width):
    x, y = drawn(tokens, width, seed=1) + 3, drawn(tokens, width, seed=2) - 1
    y = y + 0.7 * x
    h = torch.eye(tokens, dtype=DOUBLE) - 1 / tokens
    k, m = x @ x.T, y @ y.T

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ h @ b @ h) / (tokens - 1) ** 2

    expected = float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())
    assert geometry.cka(x, y) == pytest.approx(expected, rel=1e-10)
    turn = torch.linalg.qr(drawn(width, width, seed=3))[0]
    assert geometry.cka(x, 5 * y @ turn + 2) == pytest.approx(expected, rel=1e-10)


def test_cka_of_the_same_is_exactly_one_and_of_nothing_is_none():
    for shape in ((9, 20), (40, 6)):
        x = drawn(*shape).float()
        assert geometry.cka(x, x.clone()) == 1.0
        assert geometry.cka(x, torch.ones(shape)) is None


# Weights


def test_weight_change_is_a_dense_loop():
    delta, weight = drawn(4, 5, seed=1), drawn(4, 5, seed=2)
    above = sum(float(v) ** 2 for row in delta for v in row) ** 0.5
    below = sum(float(v) ** 2 for row in weight for v in row) ** 0.5
    assert geometry.weight_change(delta, weight) == pytest.approx(above / below)
    assert geometry.weight_change(delta, torch.zeros(4, 5)) is None


def test_activation_change_is_a_loop_over_tokens():
    change, x = drawn(6, 3, seed=1), drawn(6, 4, seed=2)
    x[2] = 0
    ratios = [
        math.dist(change[t].tolist(), [0] * 3) / math.dist(x[t].tolist(), [0] * 4)
        for t in range(6)
        if t != 2
    ]
    assert geometry.activation_change(change, x) == pytest.approx(sum(ratios) / 5)
    assert geometry.activation_change(change[:1], torch.zeros(1, 4)) is None


def test_effective_rank_of_constructed_spectra():
    assert geometry.effective_rank(torch.tensor([2.0] * 5 + [0.0] * 3)) == pytest.approx(5)
    assert geometry.effective_rank(torch.zeros(4)) == 0.0
    values = torch.tensor([3.0, 1.0, 0.2], dtype=DOUBLE)
    expected = math.exp(scipy.stats.entropy(values.numpy()))
    assert geometry.effective_rank(values) == pytest.approx(expected)
    left, right = torch.linalg.qr(drawn(12, 3))[0], torch.linalg.qr(drawn(9, 3, seed=1))[0]
    singular = torch.linalg.svdvals(left @ torch.diag(values) @ right.T)
    assert geometry.effective_rank(singular) == pytest.approx(expected)


def test_density_counts_entries():
    delta = torch.zeros(4, 5)
    assert geometry.density(delta) == 0.0
    delta[1, 2] = delta[3, 0] = -1e-30
    assert geometry.density(delta) == pytest.approx(2 / 20)
    assert geometry.changed_share(3, 4) == 0.75


def test_top_share_of_constructed_matrices():
    weight = drawn(20, 30)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    k = geometry.top_directions(20, 30)
    assert k == 2
    assert geometry.top_directions(3, 4) == 1
    left, right = u[:, :k], vh[:k].T

    def share(rows: list[int], columns: list[int]) -> float | None:
        return geometry.top_share(u[:, rows] @ drawn(2, 2) @ vh[columns], left, right)

    assert share([0, 1], [0, 1]) == pytest.approx(1.0)
    assert share([10, 11], [10, 11]) == pytest.approx(0.0, abs=1e-20)
    assert share([0, 1], [10, 11]) == pytest.approx(0.0, abs=1e-20)  # on both sides
    assert share([10, 11], [0, 1]) == pytest.approx(0.0, abs=1e-20)
    assert geometry.top_share(u[:, [0, 5]] @ vh[[0, 5]], left, right) == pytest.approx(0.5)
    assert geometry.top_share(torch.zeros(20, 30), left, right) is None
    random = [geometry.top_share(drawn(20, 30, seed=s), left, right) for s in range(1, 301)]
    assert np.mean(random) == pytest.approx(k**2 / (20 * 30), rel=0.15)


def test_mean_leaves_out_what_is_not_there():
    assert geometry.mean([1.0, None, 3.0]) == 2.0
    assert geometry.mean([None]) is None


def test_the_page_of_results_has_every_measure_as_it_is() -> None:
    page = (Path(__file__).parents[1] / "results" / "README.md").read_text(encoding="utf-8")
    assert measures.page().strip() in page
