"""Imported by the process from which those that measure are forked."""

from benchmarks import contenders, measure

contenders.preload()
__all__ = ["measure"]
