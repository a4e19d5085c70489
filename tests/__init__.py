"""The tests of cortex_dask; a package, so that test modules can share :mod:`tests.support`."""
