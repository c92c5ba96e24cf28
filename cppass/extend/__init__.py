"""Words for rules and site forms of your own; how to use them is in docs/extending.md.

Rules:       pointwise, row_wise, reduction, axes, Axes, given, shape_of
Site forms:  attention_site, refusal, Causal, Fresh, fresh_rows, causal_mask, given, shape_of
"""

from cppass.axes import axes, given, pointwise, reduction, row_wise
from cppass.extend.form import attention_site, refusal
from cppass.match.kv import fresh_rows
from cppass.match.mask import causal_mask
from cppass.rules import Axes, shape_of
from cppass.site import AttentionSite, Causal, Fresh

__all__ = [
    "AttentionSite",
    "Axes",
    "Causal",
    "Fresh",
    "attention_site",
    "axes",
    "causal_mask",
    "fresh_rows",
    "given",
    "pointwise",
    "reduction",
    "refusal",
    "row_wise",
    "shape_of",
]
