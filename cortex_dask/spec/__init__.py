"""What users write: ``cortex.yaml`` and submissions.

Read :mod:`cortex_dask.spec.resolution` first.
"""
