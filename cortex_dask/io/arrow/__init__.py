"""Arrow types and schemas: declared, joined and cast to.

Read :mod:`cortex_dask.io.arrow.schema` first.
"""
