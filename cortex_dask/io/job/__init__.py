"""A job in storage: its settings, plan, ledger, status, failures and logs.

Read :mod:`cortex_dask.io.job.splits` first, then :mod:`cortex_dask.io.job.ledger`.
"""
