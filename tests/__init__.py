"""The tests of cortex_dask; a package, so that test modules can share :mod:`tests.s3` and :mod:`tests.faulty_s3`."""
