"""The side of the handler process: it loads the handler and runs splits.

Read :mod:`cortex_dask.runtime.handler_process.pipeline` first.
"""
