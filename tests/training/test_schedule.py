import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.training.schedule import learning_rate, step_rate


def test_endpoints():
    rates = [learning_rate(step, 10, 30, warmup_epochs=3, lr=1.5e-3, min_lr=1e-5) for step in range(300)]
    assert rates[0] == 0
    assert rates[15] == pytest.approx(0.75e-3)
    assert rates[30] == max(rates) == pytest.approx(1.5e-3)
    assert rates[-1] == pytest.approx(1e-5)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


def test_halfway_down_the_cosine():
    # 1 step of warm-up, then 101 steps of which the middle one is at step 51.
    assert learning_rate(51, 102, 1, warmup_epochs=1 / 102, lr=1.0, min_lr=0.0) == pytest.approx(0.5)
    assert learning_rate(26, 102, 1, warmup_epochs=1 / 102, lr=1.0, min_lr=0.2) == pytest.approx(
        0.2 + 0.4 * (1 + math.cos(math.pi / 4))
    )


def test_steps_end_at_the_lowest_rate():
    """Table 12: divided by 10 after epochs 8 and 11, not below 1e-6; a rate that begins lower is kept."""

    def rates(lr: float) -> list[float]:
        found = {step: step_rate(step, 10, 4, lr=lr, min_lr=1e-6, drops=(8, 11)) for step in (1, 79, 80, 109, 110, 119)}
        return list(found.values())

    assert rates(3e-4) == pytest.approx([1.5e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6])
    assert rates(2e-5) == pytest.approx([1e-5, 2e-5, 2e-6, 2e-6, 1e-6, 1e-6])
    assert rates(5e-7) == pytest.approx([2.5e-7, *[5e-7] * 5])


def test_warm_up_may_be_a_fraction_or_none():
    assert learning_rate(0, 10, 2, warmup_epochs=0, lr=1.0, min_lr=0.0) == 1
    assert learning_rate(4, 10, 2, warmup_epochs=0.5, lr=1.0, min_lr=0.0) == pytest.approx(0.8)
    assert learning_rate(5, 10, 2, warmup_epochs=0.5, lr=1.0, min_lr=0.0) == 1


def test_a_run_of_one_step():
    assert learning_rate(0, 1, 1, warmup_epochs=0, lr=1.0, min_lr=0.0) == 1


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_it_stays_between_zero_and_the_peak_and_ends_at_the_bottom(steps, epochs, warm, low):
    warmup = warm * (epochs - 1)
    rates = [
        learning_rate(step, steps, epochs, warmup_epochs=warmup, lr=2.0, min_lr=2 * low)
        for step in range(steps * epochs)
    ]
    assert all(0 <= rate <= 2 + 1e-12 for rate in rates)
    after = rates[round(steps * warmup) :]
    assert after[0] == 2
    assert all(rate >= 2 * low - 1e-12 for rate in after)
    if len(after) > 1:
        assert after[-1] == pytest.approx(2 * low)
