"""The output of a job: parts that are staged, published, sealed and read back.

Read :mod:`cortex_dask.io.output.directory` first.
"""
