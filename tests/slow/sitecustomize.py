"""In a process with this folder on PYTHONPATH a step of training takes PICOGPT_TEST_STEP seconds longer.

So a test can meet it in the middle, and the machine is free for others meanwhile.
"""

import importlib.abc
import importlib.util
import os
import sys
import time


class SlowSteps(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != "picogpt.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            step = module.Trainer._step

            def slow(trainer, index):
                time.sleep(float(os.environ["PICOGPT_TEST_STEP"]))
                return step(trainer, index)

            module.Trainer._step = slow

        spec.loader.exec_module = exec_module
        return spec


if "PICOGPT_TEST_STEP" in os.environ:
    sys.meta_path.insert(0, SlowSteps())
