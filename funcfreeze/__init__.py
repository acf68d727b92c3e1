"""Train one model with several losses, where each loss may update only some of the parameters."""

from importlib.metadata import version as _version

from funcfreeze import checkpoint as checkpoint
from funcfreeze import merge as merge
from funcfreeze import optim as optim
from funcfreeze import schedules as schedules
from funcfreeze.alternating.alternate import alternate as alternate
from funcfreeze.alternating.alternation import Alternation as Alternation
from funcfreeze.computation.half import Half as Half
from funcfreeze.computation.loss_scale import LossScale as LossScale
from funcfreeze.computation.microbatches import Microbatches as Microbatches
from funcfreeze.computation.state import State as State
from funcfreeze.declare.ema import ema as ema
from funcfreeze.declare.plan import Plan as Plan
from funcfreeze.declare.routes import Route as Route
from funcfreeze.declare.selectors import RouteError as RouteError
from funcfreeze.declare.selectors import kind as kind
from funcfreeze.declare.selectors import path as path
from funcfreeze.declare.selectors import regex as regex
from funcfreeze.declare.selectors import where as where
from funcfreeze.fitting.fit import Fitted as Fitted
from funcfreeze.fitting.fit import fit as fit
from funcfreeze.loops.backward import backward as backward
from funcfreeze.loops.combine import combine as combine
from funcfreeze.loops.combine import plan as plan
from funcfreeze.loops.differentiate import grad as grad
from funcfreeze.loops.differentiate import grad_and_value as grad_and_value
from funcfreeze.optim import apply_updates as apply_updates
from funcfreeze.proof.equations import verify_equations as verify_equations
from funcfreeze.proof.verify import verify as verify
from funcfreeze.step import Step as Step

__version__ = _version("funcfreeze")
