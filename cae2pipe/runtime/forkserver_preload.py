"""Imported first by the server process that starts workers, and by nothing else.

It leaves the process group. Ctrl-C, and signals that torchrun and schedulers send to the whole group, then reach
only the main process, which needs its workers to finish its step.
"""

import os

os.setsid()
