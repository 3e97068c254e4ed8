"""Many methods, sparsities and seeds from one call, with equal tuning and an honest table."""

from sparsetwin.comparison._compare import TABLES, compare, write_tables
from sparsetwin.comparison._contenders import Contender, changed, find_contender, known_labels
from sparsetwin.comparison._plan import Plan, Task
from sparsetwin.comparison._runner import Keep, Progress, Runner
from sparsetwin.comparison._statistics import Difference, Summary, holm, paired_difference, summary
from sparsetwin.comparison._tasks import tasks

__all__ = [
    "TABLES",
    "Contender",
    "Difference",
    "Keep",
    "Plan",
    "Progress",
    "Runner",
    "Summary",
    "Task",
    "changed",
    "compare",
    "find_contender",
    "holm",
    "known_labels",
    "paired_difference",
    "summary",
    "tasks",
    "write_tables",
]
