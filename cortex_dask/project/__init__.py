"""What users bring: the handler and the files beside it.

Read :mod:`cortex_dask.project.contract` first.
"""
