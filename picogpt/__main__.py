"""`python -m picogpt`, which searches the working folder first: a file torch.py there would be run in place of torch."""

import os
import sys
from contextlib import suppress

with suppress(FileNotFoundError):  # the folder was deleted
    if sys.path[:1] == [os.getcwd()]:
        del sys.path[0]

from picogpt.cli import main

main()
