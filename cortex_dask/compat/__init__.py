"""The names that projects written for Cortex import: ``cortex`` and ``cortex_internal``.

This folder is put on the import path of handler processes, and of nothing else: nobody who installs cortex_dask finds a
package ``cortex`` in their environment.
"""
