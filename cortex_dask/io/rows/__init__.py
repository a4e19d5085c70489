"""Rows between files and handlers: payloads in, results out.

Read :mod:`cortex_dask.io.rows.payload` first.
"""
