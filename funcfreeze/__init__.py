"""Train one model with several losses, where each loss may update only some of the parameters."""

from importlib.metadata import version as _version

from funcfreeze import optim as optim
from funcfreeze.backward import backward as backward
from funcfreeze.differentiate import grad as grad
from funcfreeze.differentiate import grad_and_value as grad_and_value
from funcfreeze.equations import verify_equations as verify_equations
from funcfreeze.loss_scale import LossScale as LossScale
from funcfreeze.optim import apply_updates as apply_updates
from funcfreeze.plan import Plan as Plan
from funcfreeze.routes import Route as Route
from funcfreeze.selectors import RouteError as RouteError
from funcfreeze.selectors import kind as kind
from funcfreeze.selectors import path as path
from funcfreeze.selectors import regex as regex
from funcfreeze.selectors import where as where
from funcfreeze.state import State as State
from funcfreeze.step import Step as Step
from funcfreeze.verify import verify as verify

__version__ = _version("funcfreeze")
