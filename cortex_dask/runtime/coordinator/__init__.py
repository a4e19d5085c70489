"""The side of the coordinator: one run of one job.

Read :mod:`cortex_dask.runtime.coordinator.coordinator` first.
"""
