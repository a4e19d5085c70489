"""Parquet files: their footers and the batches in them.

Read :mod:`cortex_dask.io.parquet.reader` first.
"""
