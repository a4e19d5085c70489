"""From input to splits.

Read :mod:`cortex_dask.io.planning.plan` first.
"""
