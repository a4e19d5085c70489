"""The names that projects written for Cortex import: ``cortex`` and ``cortex_internal``.

This folder is on the import path of handler processes only, so that installing cortex_dask installs no package
``cortex``.
"""
