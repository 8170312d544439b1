"""Preloaded last by processes that others are forked from: no child collects the garbage of what was imported."""

import gc

gc.collect()
gc.freeze()
