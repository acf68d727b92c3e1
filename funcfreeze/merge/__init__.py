"""Where losses meet: rules that make one gradient of several, one a file.

`funcfreeze.merge` in user code: `Step(..., merge={"trunk": merge.pcgrad()})`.
"""

from collections.abc import Callable as _Callable
from collections.abc import Mapping as _Mapping
from typing import Any as _Any

from funcfreeze.merge.aligned_mtl import aligned_mtl as aligned_mtl
from funcfreeze.merge.cagrad import cagrad as cagrad
from funcfreeze.merge.dwa import dwa as dwa
from funcfreeze.merge.graddrop import graddrop as graddrop
from funcfreeze.merge.gradnorm import gradnorm as gradnorm
from funcfreeze.merge.imtl_g import imtl_g as imtl_g
from funcfreeze.merge.mean import mean as mean
from funcfreeze.merge.mgda import mgda as mgda
from funcfreeze.merge.pcgrad import pcgrad as pcgrad
from funcfreeze.merge.rule import Meeting as Meeting
from funcfreeze.merge.rule import Rule as Rule
from funcfreeze.merge.sum import sum as sum
from funcfreeze.merge.torchjd import from_torchjd as from_torchjd
from funcfreeze.merge.upgrad import upgrad as upgrad

BY_NAME: _Mapping[str, _Callable[..., _Any]] = {
    made.__name__: made
    for made in (sum, mean, pcgrad, mgda, imtl_g, cagrad, upgrad, aligned_mtl, graddrop, gradnorm, dwa)
}
"""The rules that plain data can name."""
