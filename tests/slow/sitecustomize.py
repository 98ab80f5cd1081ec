"""In a process with this folder on PYTHONPATH a step of training takes PICOGPT_TEST_STEP seconds longer.

So a test can meet it in the middle, and the machine is free for others meanwhile. And Snakemake asks SLURM every two
seconds, where the plugin waits ten more each time, as is right on a cluster.
"""

import importlib.abc
import importlib.util
import os
import sys
import time


def slow_steps(module):
    step = module.Trainer._step

    def slow(trainer, index):
        time.sleep(float(os.environ.get("PICOGPT_TEST_STEP", "0")))
        return step(trainer, index)

    module.Trainer._step = slow


def ask_often(module):
    module.Executor.next_seconds_between_status_checks = property(lambda executor: 2, lambda executor, seconds: None)


class Change(importlib.abc.MetaPathFinder):
    """Changes a module once it has been imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path[:0] = [
    Change("picogpt.train.loop", slow_steps),
    Change("snakemake_executor_plugin_slurm", ask_often),
]
