"""Faults injected for real, each with the exactly-once property checked on output, ledger and dead letters together."""
