"""Storage and data: stores, planning, reading, payloads, writing, the ledger. Nothing here knows Dask."""
