"""Saving runs and going on with them: everything that a run is, of one step, and nothing in it that could run."""

from funcfreeze.checkpoint.batches import Batches as Batches
from funcfreeze.checkpoint.dcp import from_dcp as from_dcp
from funcfreeze.checkpoint.dcp import to_dcp as to_dcp
from funcfreeze.checkpoint.into_modules import load_into as load_into
from funcfreeze.checkpoint.loading import check as check
from funcfreeze.checkpoint.loading import load as load
from funcfreeze.checkpoint.loading import resume as resume
from funcfreeze.checkpoint.saving import save as save
