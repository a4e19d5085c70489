"""Coordinators that outlive the process that submitted their job.

Read :mod:`cortex_dask.clusters.detached.process` first.
"""
