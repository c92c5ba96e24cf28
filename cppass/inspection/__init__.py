"""What the pass did to a model, for people and for programs: what `cppass.explain` and `cppass explain` show.

    views.py     the Explanation, frozen values          build.py      from the stages of each graph to it
    states.py    where the tokens of every node are      modules.py    the module tree, equal layers folded
    layout.py    the rows of every rank                  cost.py       seconds on one device and on P ranks
    advice.py    what a refusal means                    text.py       lines for print() and terminals
    document.py  JSON, by schema.json                    page.py       one HTML page, from page/

Jinja2 and rich are imported when a page or a terminal is written to.
"""

from __future__ import annotations

from cppass.inspection.build import Seen, explanation_of
from cppass.inspection.views import Explanation

__all__ = ["Explanation", "Seen", "explanation_of"]
