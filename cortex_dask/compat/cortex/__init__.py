"""The Python client that Cortex had."""
