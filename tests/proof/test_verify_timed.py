"""`verify` of timed routes: against the recipe that toggles `requires_grad` by the count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import funcfreeze as ff
import timed
from funcfreeze.gradients import Timetable
from timed import OPTIMIZERS, PROGRAMS


@pytest.mark.parametrize("options", [{}, {"engine": "reference"}, {"engine": "toggle"}], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_timed_programs_are_proven(name, options):
    program = PROGRAMS[name]
    step = ff.Step(program.model(), program.losses, program.routes, optimizer=OPTIMIZERS["adamw"][0], **options)
    report = ff.verify(step, step.init(), timed.batches(1)[0], steps=program.steps)
    assert report.ok, report
    later = step.init().replace(step=torch.tensor(4))
    report = ff.verify(step, later, timed.batches(1)[0], steps=2)
    assert report.ok, report


def test_steps_at_which_nothing_is_active_are_proven_too():
    step = ff.Step(
        timed.network(), timed.adversarial, {"cls": ff.Route("*", start=9), "dom": ff.Route("dom", start=9)},
        optimizer=ff.optim.adamw(0.1),
    )  # fmt: skip
    report = ff.verify(step, step.init(), timed.batches(1)[0], steps=2)
    assert report.ok, report


def test_a_step_with_other_times_is_found(monkeypatch):
    program = PROGRAMS["gradual unfreezing"]
    step = ff.Step(program.model(), program.losses, program.routes, optimizer=OPTIMIZERS["adamw"][0])
    own = ff.Step.compute

    def late(self, state, batch):
        other = ff.Step(self.model, self.losses, self.plan, optimizer=self.optimizer)
        half = own(other, state.replace(step=state.step - 1), batch)
        return dataclasses.replace(half)

    monkeypatch.setattr(ff.Step, "compute", late)
    report = ff.verify(step, step.init().replace(step=torch.tensor(1)), timed.batches(1)[0], steps=3)
    assert not report.ok
    assert "c.0.weight has a gradient in the recipe and none here" in str(report)


def test_a_timetable_makes_a_routing_once():
    program = PROGRAMS["all at once"]
    table = Timetable(ff.plan(program.model(), program.routes))
    routings = [table.at(count) for count in range(1000)]
    assert len({id(routing) for routing in routings}) == program.active_sets
