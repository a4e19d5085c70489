"""JSON files: read into batches, and rows written as JSON lines.

Read :mod:`cortex_dask.io.json.reader` first.
"""
