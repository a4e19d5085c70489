"""The side of the Dask worker: slots, their handler processes and the supervision of them.

Read :mod:`cortex_dask.runtime.worker.supervisor` first.
"""
