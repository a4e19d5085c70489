"""Failed batches delivered to a dead-letter target.

Read :mod:`cortex_dask.runtime.dead_letters.delivery` first.
"""
