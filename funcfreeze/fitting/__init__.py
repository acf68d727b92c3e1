"""A loop around a step that one can read in a minute, and its loggers."""

from funcfreeze.fitting.loggers import CSV as CSV
from funcfreeze.fitting.loggers import JSONLines as JSONLines
from funcfreeze.fitting.loggers import Logger as Logger
from funcfreeze.fitting.loggers import TensorBoard as TensorBoard
