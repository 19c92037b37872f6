"""From a plan to work: schedules, executors, and the directory that a run writes."""

from fxinvert.scheduling.executor import Executor, SerialExecutor, executor_named
from fxinvert.scheduling.waves import SCHEDULES, waves

__all__ = ["SCHEDULES", "Executor", "SerialExecutor", "executor_named", "waves"]
