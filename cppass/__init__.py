"""cppass: prefill context parallelism as a torch.compile pass.

    torch.compile(model, backend="npu_cp", options={...})

Everything public is here; what needs torch is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cppass.environment import keep_torch_importable

keep_torch_importable()

from cppass.config import CPConfig  # noqa: E402
from cppass.errors import (  # noqa: E402
    CPError,
    CPWarning,
    ExtensionError,
    OptionError,
    PeerError,
    Refusal,
    RefusedError,
    Unsupported,
    VerifyError,
)

if TYPE_CHECKING:
    from cppass.api import explain, run_pass, unwrap
    from cppass.backend import npu_cp
    from cppass.extend.check import check_rule
    from cppass.extend.check_form import check_site_form
    from cppass.extend.register import rule, site_form, unregister
    from cppass.hook import npu_pass
    from cppass.inspection import Explanation
    from cppass.registry import registered
    from cppass.report import Report, clear_reports, last_report, reports
    from cppass.simulator import simulate

__version__ = "0.1.0"

__all__ = [
    "CPConfig",
    "CPError",
    "CPWarning",
    "Explanation",
    "ExtensionError",
    "OptionError",
    "PeerError",
    "Refusal",
    "RefusedError",
    "Report",
    "Unsupported",
    "VerifyError",
    "__version__",
    "check_rule",
    "check_site_form",
    "clear_reports",
    "explain",
    "last_report",
    "npu_cp",
    "npu_pass",
    "registered",
    "reports",
    "rule",
    "run_pass",
    "simulate",
    "site_form",
    "unregister",
    "unwrap",
]

_LATE = {
    "Explanation": "cppass.inspection",
    "check_rule": "cppass.extend.check",
    "check_site_form": "cppass.extend.check_form",
    "rule": "cppass.extend.register",
    "site_form": "cppass.extend.register",
    "unregister": "cppass.extend.register",
    "registered": "cppass.registry",
    "explain": "cppass.api",
    "run_pass": "cppass.api",
    "unwrap": "cppass.api",
    "npu_cp": "cppass.backend",
    "npu_pass": "cppass.hook",
    "Report": "cppass.report",
    "clear_reports": "cppass.report",
    "last_report": "cppass.report",
    "reports": "cppass.report",
    "simulate": "cppass.simulator",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'cppass' has no attribute {name!r}")
