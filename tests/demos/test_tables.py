"""What is said about the numbers follows from the numbers."""

import io

from rich.console import Console

from funcfreeze.demos.adversarial import Point
from funcfreeze.demos.speed import Timings
from funcfreeze.demos.tables import speed_in_words, trials_in_words, trials_table
from funcfreeze.demos.trials import Trials


def trials(*outcomes):
    """One curve of two points for each (source, target, probe) of the adversarial run; the baseline has halves."""
    half = tuple((Point(1, 0.75, 0.75, 0.75), Point(2, 0.5, 0.5, 0.5)) for _ in outcomes)
    curves = tuple((Point(1, 0.0, 0.0, 0.0), Point(2, *outcome)) for outcome in outcomes)
    return Trials(tuple(range(len(outcomes))), {"baseline": half, "adversarial": curves})


def printed(table):
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


def test_every_seed_mean_and_spread_are_shown():
    text = printed(trials_table(trials((0.6, 0.9, 0.5), (0.6, 0.7, 0.5))))
    assert text.count("0.500 -> 0.600") == 3
    assert "0.500 -> 0.900" in text
    assert "0.500 -> 0.700" in text
    assert "0.500 -> 0.800" in text
    assert "0.000 -> 0.141" in text


def test_one_seed_shows_no_spread():
    one = trials((0.6, 0.9, 0.5))
    assert "std" not in printed(trials_table(one))
    assert sum("on one seed" in sentence for sentence in trials_in_words(one)) == 3


def test_a_gain_counts_only_beyond_the_spread():
    source, target, probe, *_ = trials_in_words(trials((0.2, 0.9, 0.5), (0.9, 0.8, 0.5)))
    assert source.endswith("no difference shown")
    assert "+0.350, beyond the spread" in target
    assert probe.endswith("no difference shown")


def test_the_baseline_is_shown_at_its_best_moment_too():
    assert "baseline's best mean target accuracy at any time was 0.750, after 1 steps." in "\n".join(
        trials_in_words(trials((0.6, 0.9, 0.5)))
    )


def test_nothing_is_said_about_speed_after_too_few_rounds():
    taken = {"recipe": 100.0, "reversal": 60.0, "reversal, fused Adam": 50.0, "routed": 55.0}
    few, many = (" ".join(speed_in_words(Timings(taken, 1e-8, rounds, threads=2, torch="2.13.0"))) for rounds in (4, 5))
    assert "0.55 of the time of the recipe, and 1.10 of that of a reversal layer" in many
    assert "of the recipe" not in few
    assert "Only 4 of 5 rounds" in few
    assert "--speed-seconds" in few
