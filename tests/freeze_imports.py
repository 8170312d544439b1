"""Preloaded last by processes that others are forked from, so that the children's garbage collectors ignore imported
objects."""

import gc

gc.collect()
gc.freeze()
