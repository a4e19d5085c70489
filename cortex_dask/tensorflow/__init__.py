"""The ``tensorflow_client`` of handlers of ``type: tensorflow``.

Read :mod:`cortex_dask.tensorflow.client` first.
"""
