"""Imported first of all by the server process that workers are started from, and by nothing else.

It leaves the process group: Ctrl-C, and what torchrun and schedulers send to a whole group, then reaches the main
process alone, which finishes its step and needs its workers for that.
"""

import os

os.setsid()
