"""Which files and rows a job reads.

Read :mod:`cortex_dask.io.input.files` first.
"""
