"""Kubernetes, by the Dask operator, as a backend.

Read :mod:`cortex_dask.clusters.kubernetes.cluster` first.
"""
