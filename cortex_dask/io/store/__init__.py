"""Files on any file system: stores, inputs and listings.

Read :mod:`cortex_dask.io.store.store` first.
"""
