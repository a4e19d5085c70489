"""Dask Gateway as a backend.

Read :mod:`cortex_dask.clusters.gateway.cluster` first.
"""
