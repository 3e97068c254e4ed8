"""What is said of numbers: against published tables and other programs."""

import math

import pytest

from sparsetwin.comparison import (
    holm,
    paired_difference,
    summary,
)
from sparsetwin.comparison._results import corrected
from sparsetwin.errors import ConfigError
from sparsetwin.report import Gap, MethodRow


class TestStatistics:
    """Against numbers of published tables and of other programs."""

    @pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)])
    def test_the_half_width_is_students_t_times_the_error_of_the_mean(self, count, quantile):
        values = [float(value) for value in range(count)]
        deviation = math.sqrt(sum((v - (count - 1) / 2) ** 2 for v in values) / (count - 1))
        found = summary(values)
        assert (found.mean, found.deviation) == pytest.approx(((count - 1) / 2, deviation))
        assert found.half_width == pytest.approx(quantile * deviation / math.sqrt(count), rel=3e-4)

    def test_the_paired_test_has_the_p_value_of_the_closed_form(self):
        first, second = [30.02, 29.99, 30.11, 29.97, 30.01, 29.99], [29.89, 29.93, 29.72, 29.98, 30.02, 29.98]
        found = paired_difference(first, second)
        t = 0.095 / math.sqrt(0.11875 / 5 / 6)
        angle = math.atan(t / math.sqrt(5))  # of 5 degrees of freedom there is a closed form
        within = 2 / math.pi * (angle + math.sin(angle) * (math.cos(angle) + 2 / 3 * math.cos(angle) ** 3))
        assert found.mean == pytest.approx(0.095)
        assert found.p_value == pytest.approx(1 - within, abs=1e-9)

    def test_one_value_has_no_deviation_and_one_pair_no_p_value(self):
        assert math.isnan(summary([1.0]).half_width)
        assert math.isnan(paired_difference([1.0], [2.0]).p_value)
        assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1
        with pytest.raises(ConfigError, match="equally many values, got 1 and 2"):
            paired_difference([1.0], [1.0, 2.0])
        with pytest.raises(ConfigError, match="at least one value"):
            summary([])

    def test_holm_keeps_the_order_and_never_falls_below_a_smaller_p_value(self):
        assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
        assert holm([0.6, 0.7]) == [1.0, 1.0]
        assert holm([]) == []


class TestCorrection:
    """p-values over all tables of a comparison."""

    def test_every_difference_counts_and_what_stands_in_both_tables_counts_once(self):
        def row(label: str, *, reference: float | None, dense: float | None) -> MethodRow:
            to_reference, to_dense = (
                None if p is None else Gap(pairs=5, difference=0.01, half_width=0.01, p_value=p)
                for p in (reference, dense)
            )
            return MethodRow(
                label=label, sparsity=0.9, achieved_sparsity=0.9, epochs=1, seeds=5, accuracy=0.7, deviation=0.1,
                half_width=0.1, twin_accuracy=math.nan, twin_deviation=math.nan, to_reference=to_reference,
                to_dense=to_dense, training_share=1, inference_share=1, seconds=1, failed=0,
            )  # fmt: skip

        acdc = row("acdc", reference=None, dense=0.01)
        tables = {"epochs": [acdc, row("rigl", reference=0.02, dense=0.02)],
                  "flops": [acdc, row("rigl", reference=0.04, dense=math.nan)]}  # fmt: skip
        found = corrected(tables)
        # four differences: 0.01 * 4, then 0.02 * 3 twice (never falling), then 0.04 * 1
        assert [r.to_dense.p_value for r in found["epochs"]] == pytest.approx([0.04, 0.06])
        assert found["epochs"][1].to_reference.p_value == pytest.approx(0.06)
        assert found["flops"][0] == found["epochs"][0]
        assert found["flops"][1].to_reference.p_value == pytest.approx(0.06)
        assert math.isnan(found["flops"][1].to_dense.p_value)
